"""LoRA and its base layer as one operation, under masks that move. Oracle: PEFT's own layers under the same masks."""

import pytest
import torch

from atp.layers import attach, detach
from atp.structure.discovery import discover
from atp.structure.space import build_space
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
