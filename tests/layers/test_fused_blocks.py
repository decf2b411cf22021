"""Masks in norms, residual adds and SwiGLU. Oracle: masks at the linear layers, the definition of both.

The operations compute eagerly here; kernels in their place: `tests/ops/kernels/test_blocks.py`.
"""

from types import MethodType

import pytest
import torch
from torch import nn

from atp.layers import attach, detach
from atp.layers.fused import is_fusable
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import random_masks

FUSABLE = [f for f in families.FAMILIES if f.startswith(("llama", "mistral", "qwen", "smollm3"))]
spaces = pytest.mark.parametrize("space_name", ["width", "disp"])


def attached(family, space_name, sparsity=0.4, impl="eager"):
    """A model under random hard masks, its blocks fused after that."""
    model = families.with_lora(families.build(family))
    attachment = attach(model, build_space(discover(model), space_name))
    attachment.set_masks(random_masks(attachment.space, sparsity))
    return model, attachment


def results(model, attachment):
    """Logits and, by name, gradients of adapters and masks."""
    model.zero_grad()
    attachment.require_gradients(not attachment.is_compact)
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: leaf.grad.clone() for name, leaf in attachment.masks.items() if leaf.grad is not None}
    attachment.require_gradients(False)
    return {"logits": families.logits(model), **found}


def agree(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name, expected in other.items():
        if expected.abs().max() > 1e-6:
            assert families.relative_error(one[name], expected) <= tolerance, name
        else:
            assert one[name].abs().max() <= 1e-6, name


@spaces
@pytest.mark.parametrize("family", FUSABLE)
def test_values_and_all_gradients_are_those_of_masks_at_the_layers(family, space_name):
    model, attachment = attached(family, space_name)
    expected = results(model, attachment)
    assert attachment.fuse_blocks("eager")
    assert type(attachment.lm.get_submodule(attachment.space.structure.blocks[0].path)).__name__.startswith("Fused")
    agree(results(model, attachment), expected, 1e-4)
    detach(model)
    assert not any(type(module).__name__.startswith(("Masked", "Fused")) for module in model.modules())


@spaces
@pytest.mark.parametrize("family", FUSABLE)
def test_only_what_is_kept_is_computed_under_a_final_decision(family, space_name):
    model, attachment = attached(family, space_name)
    attachment.fuse_blocks("eager")
    attachment.compact()
    compact = results(model, attachment)
    widths = {}
    hooks = [
        module.register_forward_hook(
            lambda m, args, out, path=path: widths.update({path: (args[0].shape[-1], out.shape[-1])})
        )
        for path, module in attachment.modules.items()
    ]
    families.logits(model)
    for hook in hooks:
        hook.remove()
    kept = {name: int(mask.sum()) for name, mask in attachment.masks.items()}
    for linear in attachment.space.linears:
        for axis, width in zip((linear.cols, linear.rows), widths[linear.path], strict=True):
            if axis is not None:
                assert width == kept[axis.set] * axis.units, (linear.path, axis.set)
    attachment.set_masks(attachment.decision())
    assert not attachment.is_compact
    masked = results(model, attachment)
    agree(compact, {name: masked[name] for name in compact}, 1e-4)


@spaces
def test_lifted_and_plain_are_what_they_are_without_fusing(space_name):
    model, attachment = attached("llama", space_name)
    with attachment.lifted():
        lifted = families.logits(model)
    masked = families.logits(model)
    attachment.fuse_blocks("eager")
    for compact in (False, True):
        if compact:
            attachment.compact()
        with attachment.lifted():
            assert torch.allclose(families.logits(model), lifted, atol=1e-5)
        with attachment.plainly():
            assert not any(type(m).__name__.startswith("Fused") for m in model.modules())
            assert torch.allclose(families.logits(model), masked, atol=1e-5)
        assert attachment.is_compact is compact
        assert torch.allclose(families.logits(model), masked, atol=1e-5)
        assert any(type(m).__name__.startswith("Fused") for m in model.modules())


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - set(FUSABLE)))
def test_other_blocks_are_left_alone(family):
    model, attachment = attached(family, "disp")
    before = families.logits(model)
    assert not attachment.fuse_blocks("eager")
    assert torch.equal(families.logits(model), before)


def test_a_norm_or_an_mlp_of_another_kind_is_not_taken_for_llamas():
    block = families.build("llama").model.layers[0]
    assert is_fusable(block)
    block.input_layernorm = nn.LayerNorm(block.input_layernorm.weight.shape)
    assert not is_fusable(block)
    block = families.build("llama").model.layers[0]
    block.mlp.act_fn = nn.ReLU()
    assert not is_fusable(block)


@pytest.mark.parametrize("part", ["", ".mlp", ".input_layernorm"])
def test_a_forward_put_on_a_module_itself_is_not_taken_for_llamas(part):
    model, attachment = attached("llama", "disp")
    path = attachment.space.structure.blocks[0].path
    module = attachment.lm.get_submodule(path + part)
    module.forward = MethodType(type(module).forward, module)
    expected = families.logits(model)
    attachment.fuse_blocks("eager")
    assert 0 not in attachment._blocks
    assert torch.allclose(families.logits(model), expected, atol=1e-5)


def test_masks_changed_among_plain_blocks_are_not_cut():
    model, attachment = attached("llama", "width")
    attachment.fuse_blocks("eager")
    attachment.compact()
    soft = {name: torch.rand_like(mask) for name, mask in attachment.masks.items()}
    with attachment.plainly():
        attachment.set_masks(soft)
        expected = families.logits(model)
    assert not attachment.is_compact
    assert torch.allclose(families.logits(model), expected, atol=1e-5)


def test_plain_blocks_may_be_asked_for_where_layers_are_lifted():
    model, attachment = attached("llama", "width")
    attachment.fuse_blocks("eager")
    expected = families.logits(model)
    with attachment.lifted(), attachment.plainly():
        pass
    assert torch.allclose(families.logits(model), expected, atol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    model, attachment = attached("llama", "disp")
    attachment.fuse_blocks("eager")
    model.train()
    expected = results(model, attachment)
    families.checkpoint(model)
    agree(results(model, attachment), expected)
