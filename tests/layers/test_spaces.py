"""Masks of spaces that reach beyond a layer: the residual stream as a whole, attentions and MLPs as a whole.

Oracle: the same model with zeros in the weights that a decision removes, and in what the embedding gives.
"""

import pytest
import torch

from atp.layers import attach, attachment_of, detach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm
from tests import families
from tests.export import cases
from tests.export.cases import SPACES, masked, random_masks

CASES = [(family, space) for family, space in cases.CASES if space in ("hidden", "depth", "blocks", "all")]


def _with_zeros(model, space, masks):
    """Weights of `model` set to zero, in place."""
    with torch.no_grad():
        for linear in space.linears:
            layer = model.get_submodule(linear.path)
            for axis, dim in ((linear.rows, 0), (linear.cols, 1), (linear.switch, 0)):
                if axis is None or (axis is linear.switch and not linear.mask_switch):
                    continue
                alive = masks[axis.set][axis.owner]
                layer.weight.mul_(alive[:, None] if dim == 0 else alive)
                if dim == 0 and layer.bias is not None:
                    layer.bias.mul_(alive)
    if space.stream is not None:
        model.get_input_embeddings().register_forward_hook(lambda _m, _a, y: y * masks[space.stream.set])
    return model


@pytest.mark.parametrize(("family", "space_name"), CASES)
def test_masked_equals_zeros_in_the_weights(family, space_name):
    model = masked(families.build(family), space_name)
    attachment = attachment_of(model)
    zeroed = _with_zeros(families.build(family), attachment.space, attachment.decision())
    assert not torch.equal(families.logits(model), families.logits(families.build(family)))
    assert families.relative_error(families.logits(model), families.logits(zeroed)) <= 1e-5


@pytest.mark.parametrize("space_name", ["hidden", "depth", "all"])
def test_nothing_changes_until_a_mask_does_and_detaching_leaves_no_trace(space_name):
    model = families.with_lora(families.build("llama"))
    before, classes = families.logits(model), [type(m) for m in model.modules()]
    name, uniform = SPACES[space_name]
    attachment = attach(model, build_space(discover(model), name, uniform=uniform))
    assert torch.equal(families.logits(model), before)
    attachment.set_masks(random_masks(attachment.space))
    attachment.compact()
    detach(model)
    assert torch.equal(families.logits(model), before)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("space_name", ["hidden", "depth", "all"])
def test_lifted_is_the_dense_model(space_name, compact):
    model = families.with_lora(families.build("gemma3"))
    dense = families.logits(model)
    attachment = attachment_of(masked(model, space_name))
    assert not compact or attachment.compact()
    pruned = families.logits(model)
    with attachment.lifted():
        assert torch.equal(families.logits(model), dense)
    assert torch.equal(families.logits(model), pruned)


@pytest.mark.parametrize("space_name", ["hidden", "depth", "all"])
def test_fused_blocks_compute_the_same(space_name):
    model = masked(families.with_lora(families.build("llama")), space_name)
    attachment, expected = attachment_of(model), families.logits(model)
    assert attachment.fuse_blocks("eager")
    assert families.relative_error(families.logits(model), expected) <= 1e-5
    assert attachment.compact()
    assert families.relative_error(families.logits(model), expected) <= 1e-5
    detach(model)
    assert not any(type(m).__name__.startswith(("Masked", "Fused", "Skipped")) for m in model.modules())


def test_gradients_of_masks_are_those_of_finite_differences():
    model = families.build("llama").double()
    name, uniform = SPACES["all"]
    attachment = attach(model, build_space(discover(model), name, uniform=uniform))
    batch = families.tokens()

    def loss():
        return model(input_ids=batch, labels=batch).loss

    attachment.require_gradients(True)
    loss().backward()
    for s in attachment.space.sets:
        if s.kind not in ("hidden", "whole_attention", "whole_mlp"):
            continue
        leaf, index = attachment.masks[s.name], s.size // 2
        expected = leaf.grad[index].item()
        with torch.no_grad():
            leaf[index] += 0.01
            above = loss().item()
            leaf[index] -= 0.02
            below = loss().item()
            leaf[index] += 0.01
        assert (above - below) / 0.02 == pytest.approx(expected, rel=1e-2, abs=1e-4), s.name


def test_attention_that_is_skipped_still_fills_a_cache():
    """Oracle: generation without one."""
    model = masked(families.with_lora(families.build("llama")), "depth")
    attachment_of(model).compact()
    prompt, settings = families.tokens(2, 9), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    lm = causal_lm(model)
    seen = torch.ones_like(prompt)
    cached = lm.generate(prompt, attention_mask=seen, use_cache=True, **settings)
    assert torch.equal(cached, lm.generate(prompt, attention_mask=seen, use_cache=False, **settings))
