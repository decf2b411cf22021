"""LoRA and its base layer as one operation, under masks that move. Oracle: PEFT's own layers under the same masks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from atp.evaluation import flops_per_token
from atp.layers import attach, detach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import random_masks

every_case = pytest.mark.parametrize(
    ("family", "space_name"), [(f, s) for f in families.FAMILIES for s in ("width", "disp")]
)


def attached(family="llama", space_name="width"):
    model = families.with_lora(families.build(family))
    attachment = attach(model, build_space(discover(model), space_name))
    attachment.set_masks(random_masks(attachment.space))
    return model, attachment


def values_and_gradients(model, attachment):
    """Logits, and gradients of adapters and masks."""
    model.zero_grad()
    attachment.require_gradients(True)
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: leaf.grad.clone() for name, leaf in attachment.masks.items()}
    attachment.require_gradients(False)
    return found | {"logits": families.logits(model)}


@every_case
def test_values_and_gradients_stay(family, space_name):
    model, attachment = attached(family, space_name)
    expected = values_and_gradients(model, attachment)
    attachment.fuse_adapters()
    found = values_and_gradients(model, attachment)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(tensor.norm().item(), 1e-6)
        assert (found[name] - tensor).norm().item() <= 1e-4 * scale, name


@every_case
def test_detaching_leaves_no_trace(family, space_name):
    model = families.with_lora(families.build(family))
    expected, classes = families.logits(model), [type(m) for m in model.modules()]
    attach(model, build_space(discover(model), space_name)).fuse_adapters()
    detach(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(families.logits(model), expected)


def test_every_lora_layer_is_fused_masked_or_not(monkeypatch):
    """PEFT's own forward is never called."""
    model, attachment = attached()
    attachment.fuse_adapters()

    def unexpected(*_args, **_kwargs):
        raise AssertionError("PEFT's forward was called")

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.forward", unexpected)
    families.logits(model)


def test_a_base_that_is_trained_is_left_to_peft():
    """`bias="lora_only"`: biases of the base layers learn."""
    config = LoraConfig(r=4, target_modules="all-linear", bias="lora_only", task_type="CAUSAL_LM")
    model = get_peft_model(families.build("qwen2"), config)
    attachment = attach(model, build_space(discover(model), "width"))
    expected = values_and_gradients(model, attachment)
    assert any(name.endswith(".bias") for name in expected)
    attachment.fuse_adapters()
    assert values_and_gradients(model, attachment).keys() == expected.keys()
    assert not attachment.compact()


def test_an_adapter_of_another_kind_added_later_is_left_to_peft():
    model, attachment = attached()
    attachment.fuse_adapters()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False))
    model.set_adapter("other")
    found = families.logits(model)
    detach(model)
    attach(model, attachment.space).set_masks(attachment.masks)
    assert torch.equal(families.logits(model), found)


def test_several_adapters_add_up():
    model, attachment = attached()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = families.logits(model)
    attachment.fuse_adapters()
    assert families.relative_error(families.logits(model), expected) <= 1e-5
    assert attachment.compact()
    assert families.relative_error(families.logits(model), expected) <= 1e-5


def test_dropout_draws_what_peft_draws():
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(families.build("llama"), config).train()
    attachment = attach(model, build_space(discover(model), "width"))
    losses = []
    for fuse in (lambda: None, attachment.fuse_adapters):
        fuse()
        torch.manual_seed(0)
        losses.append(model(input_ids=families.tokens(), labels=families.tokens()).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_hooks_inside_a_layer_are_called():
    model, attachment = attached()
    attachment.fuse_adapters()
    expected = flops_per_token(model)
    detach(model)
    assert flops_per_token(model) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_computes_in_low_precision_with_gradients_as_close(checkpointing):
    """Oracle: float32; PEFT's layers in the same autocast may be no closer, but for a tenth."""
    model, attachment = attached()
    exact = values_and_gradients(model, attachment)
    if checkpointing:
        families.checkpoint(model)
        model.train()
    errors = []
    for fuse in (lambda: None, attachment.fuse_adapters):
        fuse()
        with torch.autocast("cpu", torch.bfloat16):
            found = values_and_gradients(model, attachment)
        lora = [name for name in exact if "lora_" in name]
        off = torch.stack([(found[name] - exact[name]).norm() for name in lora]).norm()
        errors.append((off / torch.stack([exact[name].norm() for name in lora]).norm()).item())
    assert errors[1] <= 1.1 * errors[0]


def test_what_a_layer_gives_may_be_changed_in_place():
    """As models that clip queries, keys and values do."""
    model, attachment = attached()
    attachment.fuse_adapters()
    layer = next(iter(attachment.modules.values()))
    layer.register_forward_hook(lambda _module, _args, output: output.clamp_(-1, 1))
    model(input_ids=families.tokens(), labels=families.tokens()).loss.backward()


def test_adapters_by_row_are_left_to_peft():
    """A call that names an adapter for every row."""
    model, attachment = attached()
    names = ["default"] * len(families.tokens())
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=families.tokens(), adapter_names=names).logits
        attachment.fuse_adapters()
        assert torch.equal(model(input_ids=families.tokens(), adapter_names=names).logits, expected)


def test_new_masks_stay_fused_and_a_final_decision_is_compact():
    model, attachment = attached()
    attachment.fuse_adapters()
    attachment.set_masks(random_masks(attachment.space, seed=1))
    masked = families.logits(model)
    assert attachment.compact()
    assert families.relative_error(families.logits(model), masked) <= 1e-5
