"""Layers that compute only what is kept.

Oracle: the masked model, which multiplies by the same masks; its gradients with respect to LoRA.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from atp.errors import UnsupportedModelError
from atp.layers import attach, compact, detach
from atp.layers.masked import is_masked, masks_of
from atp.ops import compact_weight
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import CASES, random_masks

every_case = pytest.mark.parametrize(
    ("family", "space_name"),
    [case for case in CASES if case[1] in ("width", "disp", "values")] + [(f, "depth") for f in families.FAMILIES],
)
joined_cases = pytest.mark.parametrize(
    ("family", "space_name"),
    [(f, s) for f in ("llama_tied", "phi3", "gemma3", "olmo2", "granite") for s in ("hidden", "width+hidden+depth")],
)


def _attached(family="llama", space_name="width", sparsity=0.4, model=None):
    model = model or families.with_lora(families.build(family))
    space = build_space(discover(model), space_name)
    attachment = attach(model, space)
    attachment.set_masks(random_masks(space, sparsity))
    return model, attachment


def _logits_and_gradients(model):
    model.zero_grad()
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return families.logits(model), gradients


def _close(one, other):
    return families.relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("sparsity", [0.1, 0.4])
@every_case
def test_values_and_gradients_are_those_of_the_masked_model(family, space_name, sparsity):
    model, attachment = _attached(family, space_name, sparsity)
    _compact_computes_the_same(model, attachment)
    detach(model)
    assert not any(type(module).__name__.startswith("Masked") for module in model.modules())


@pytest.mark.parametrize("sparsity", [0.1, 0.4])
@joined_cases
def test_values_and_gradients_where_the_stream_is_cut(family, space_name, sparsity):
    model, attachment = _attached(family, space_name, sparsity)
    _compact_computes_the_same(model, attachment)


def _compact_computes_the_same(model, attachment):
    logits, gradients = _logits_and_gradients(model)
    assert attachment.compact()
    compact_logits, compact_gradients = _logits_and_gradients(model)
    assert _close(compact_logits, logits)
    assert compact_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient.abs().max() > 1e-6:
            assert families.relative_error(compact_gradients[name], gradient) <= 1e-4, name
        else:
            assert compact_gradients[name].abs().max() <= 1e-6, name


@every_case
def test_a_block_may_lose_everything(family, space_name):
    """As it may where decisions are not projected onto the budget (`ATPConfig.paper()`)."""
    model, attachment = _attached(family, space_name)
    gone = {s.name: torch.zeros(s.size) for s in attachment.space.sets if s.block == 1}
    assert gone
    attachment.set_masks(attachment.decision() | gone)
    _compact_computes_the_same(model, attachment)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_attention_that_loses_all_heads_is_given_some(family):
    """Kernels for attention divide by their number."""
    model, attachment = _attached(family)
    attachment.set_masks({s.name: torch.zeros(s.size) for s in attachment.space.sets})
    attachment.compact()
    heads = []
    for layer in attachment.lm.model.layers:
        for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            reader.register_forward_hook(lambda _m, _args, y: heads.append(y.shape[-1]))
    families.logits(model)
    assert min(heads) > 0


def _copies_held(attachment):
    """By each layer that loses something, whether it holds a copy of its kept weight."""
    arithmetics = [masks_of(module).arithmetic for module in attachment.modules.values() if is_masked(module)]
    return [arithmetic._copy is not None for arithmetic in arithmetics]


@pytest.mark.parametrize("space_name", ["width", "disp"])
@pytest.mark.parametrize("family", ["llama", "starcoder2", "gemma3"])
def test_calls_of_many_tokens_copy_the_base_weight_each_time(family, space_name, monkeypatch):
    """Values and gradients are those of calls of few tokens, and no copy is left."""
    model, attachment = _attached(family, space_name)
    attachment.compact()
    logits, gradients = _logits_and_gradients(model)
    attachment.set_masks(attachment.decision())
    attachment.compact()
    monkeypatch.setattr(compact, "WORTH_COPYING_AGAIN", 2)
    again, gradients_again = _logits_and_gradients(model)
    assert torch.equal(again, logits)
    assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())
    held = _copies_held(attachment)
    assert held
    assert not any(held)


def test_copies_of_calls_of_few_tokens_go_with_the_next_of_many(monkeypatch):
    model, attachment = _attached()
    attachment.compact()
    families.logits(model)
    assert all(_copies_held(attachment))
    monkeypatch.setattr(compact, "WORTH_COPYING_AGAIN", 2)
    families.logits(model)
    assert not any(_copies_held(attachment))


@pytest.mark.parametrize("lasting", [False, True])
def test_beside_a_gpu_no_copy_stays_that_has_no_room(lasting):
    few = torch.empty(1, 4, 8, device="meta")  # not on a CPU either
    assert compact.CompactLinear(lasting=lasting)._keeps_copy(few) == lasting


def test_a_final_decision_is_copied_once_where_there_is_room(monkeypatch):
    model, attachment = _attached()
    monkeypatch.setattr(compact, "WORTH_COPYING_AGAIN", 2)
    held = []
    for room in (False, True):
        monkeypatch.setattr("atp.layers.attachment.copies_fit", lambda *_, room=room: room)
        for final in (False, True):
            attachment.compact(final)
            families.logits(model)
            held.append(all(_copies_held(attachment)))
    assert held == [False, False, False, True]


@pytest.mark.parametrize("space_name", ["width", "disp"])
def test_rows_and_columns_go_in_one_pass_over_the_weight(space_name, monkeypatch):
    """On a GPU, by one kernel."""
    passes = []
    monkeypatch.setattr(compact, "compact_weight", lambda *args: passes.append(args) or compact_weight(*args))
    model, attachment = _attached(space_name=space_name)
    attachment.compact()
    families.logits(model)
    arithmetics = [masks_of(module).arithmetic for module in attachment.modules.values() if is_masked(module)]
    sides = [[s for s in (a.outputs, a.inputs) if s is not None] for a in arithmetics if not a.is_whole]
    left_out = [[s.selection for s in own] for own in sides if all(s.selection is not None for s in own)]
    assert left_out
    assert left_out == [[s for s in (rows, cols) if s is not None] for _, rows, cols in passes]


@pytest.mark.parametrize(("copies", "fit"), [(99, True), (101, False)])
def test_copies_may_take_half_of_what_activations_leave(copies, fit, monkeypatch):
    """Of 500 bytes 40 % are gone, and half of those 200 may be taken."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1500)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)  # who measures memory has reset it
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)
    assert compact.copies_fit(torch.device("cuda"), copies, 0.4) is fit
    assert not compact.copies_fit(torch.device("cpu"), copies, 0.4)


@every_case
def test_new_masks_put_the_masked_layers_back(family, space_name):
    model, attachment = _attached(family, space_name)
    before = families.logits(model)
    attachment.compact()
    few = space_name == "depth"  # of its few decisions, two draws may be one
    attachment.set_masks(attachment.space.full() if few else random_masks(attachment.space, seed=1))
    assert not attachment.is_compact
    assert not _close(families.logits(model), before)
    attachment.require_gradients(True)
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    assert all(leaf.grad is not None for leaf in attachment.masks.values())


def test_only_kept_channels_exist_between_the_layers_of_a_block():
    model, attachment = _attached()
    attachment.compact()
    kept = {name: int(mask.sum()) for name, mask in attachment.masks.items()}
    seen = {}
    for path, layer in attachment.modules.items():
        layer.register_forward_hook(lambda _m, x, y, path=path: seen.update({path: (x[0].shape[-1], y.shape[-1])}))
    families.logits(model)
    head = 48 // 6
    for block in (0, 1):
        heads, channels = 2 * head * kept[f"{block}.kv"], kept[f"{block}.mlp"]
        assert seen[f"model.layers.{block}.self_attn.q_proj"] == (48, heads)
        assert seen[f"model.layers.{block}.self_attn.o_proj"] == (heads, 48)
        assert seen[f"model.layers.{block}.mlp.up_proj"] == (48, channels)
        assert seen[f"model.layers.{block}.mlp.down_proj"] == (channels, 48)


def test_adapters_may_be_switched_off_and_merged():
    model, attachment = _attached()
    with model.disable_adapter():
        off = families.logits(model)
    on = families.logits(model)
    attachment.compact()
    assert _close(families.logits(model), on)
    with model.disable_adapter():
        assert _close(families.logits(model), off)
    model.merge_adapter()
    assert _close(families.logits(model), on)
    with model.disable_adapter():
        assert _close(families.logits(model), off)
    model.unmerge_adapter()
    assert _close(families.logits(model), on)


@pytest.mark.parametrize("space_name", ["width", "disp"])
def test_dropout_is_drawn_as_in_the_masked_model(space_name):
    model = families.with_lora(families.build("llama"), lora_dropout=0.5).train()
    model, attachment = _attached(space_name=space_name, model=model)
    batch, losses, after = families.tokens(), [], []
    for step in (lambda: None, attachment.compact):
        step()
        torch.manual_seed(0)
        losses.append(model(input_ids=batch, labels=batch).loss.item())
        after.append(torch.rand(1))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.equal(*after)


def test_the_base_weight_is_copied_in_the_dtype_that_computes():
    model, attachment = _attached()
    attachment.compact()
    with torch.autocast("cpu", torch.bfloat16):
        low = families.logits(model)
    assert families.relative_error(low.float(), families.logits(model)) <= 5e-2
    attachment.set_masks(attachment.decision())
    with torch.autocast("cpu", torch.bfloat16):
        assert families.relative_error(families.logits(model), low) <= 2e-2


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_stay_masked(settings):
    model = families.build("llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    model, attachment = _attached(model=model)
    expected = families.logits(model)
    assert not attachment.compact()
    assert not attachment.is_compact
    assert torch.equal(families.logits(model), expected)


def test_what_only_the_layers_own_forward_can_do_is_refused():
    _, attachment = _attached()
    attachment.compact()
    layer = attachment.modules["model.layers.0.mlp.up_proj"]
    with pytest.raises(UnsupportedModelError, match="called with adapter_names: set impl to 'eager'"):
        layer(torch.zeros(1, 48), adapter_names=["default"])


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model, attachment = _attached()
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            families.checkpoint(model)
        attachment.compact()
        gradients.append(_logits_and_gradients(model)[1])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
