"""Masks put on a live model and taken off again.

Oracle: the untouched model, bitwise; a masked forward written out by hand on zeroed weights.
"""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model_state_dict

from atp.errors import ATPError, UnsupportedModelError
from atp.layers import attach, attachment_of, detach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import base_layer
from tests import families
from tests.export.cases import CASES, random_masks

every_case = pytest.mark.parametrize(
    ("family", "space_name"), [case for case in CASES if case[1] in ("width", "disp", "values")]
)


def _space(model, space_name):
    return build_space(discover(model), space_name)


@every_case
def test_all_ones_masks_change_no_bit_and_detaching_leaves_no_trace(family, space_name):
    model = families.with_lora(families.build(family))
    expected, keys = families.logits(model), list(model.state_dict())
    adapter = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    classes = [type(m) for m in model.modules()]
    attach(model, _space(model, space_name))
    assert torch.equal(families.logits(model), expected)
    assert list(model.state_dict()) == keys
    attached_adapter = get_peft_model_state_dict(model)
    assert list(attached_adapter) == list(adapter)
    assert all(torch.equal(attached_adapter[name], adapter[name]) for name in adapter)
    detach(model)
    assert attachment_of(model) is None
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert torch.equal(families.logits(model), expected)


@every_case
def test_detaching_undoes_any_decision(family, space_name):
    model = families.with_lora(families.build(family))
    expected = families.logits(model)
    space = _space(model, space_name)
    attach(model, space).set_masks(random_masks(space))
    assert not torch.equal(families.logits(model), expected)
    detach(model)
    assert torch.equal(families.logits(model), expected)


@every_case
@pytest.mark.parametrize("compact", [False, True])
def test_lifted_masks_are_not_there_and_come_back(family, space_name, compact):
    model = families.with_lora(families.build(family))
    dense = families.logits(model)
    attachment = attach(model, _space(model, space_name))
    attachment.set_masks(random_masks(attachment.space))
    if compact:
        attachment.compact()
    pruned = families.logits(model)
    with attachment.lifted():
        assert torch.equal(families.logits(model), dense)
    assert attachment.is_compact == compact
    assert torch.equal(families.logits(model), pruned)
    assert not torch.equal(dense, pruned)


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f != "olmo2"])
@pytest.mark.parametrize("space_name", ["width", "disp"])
def test_masks_equal_zeroed_rows_and_columns(family, space_name):
    """Not OLMo 2: zeroing rows gives the same there, but its norm is checked by export's tests."""
    masked, zeroed = families.build(family), families.build(family)
    space = _space(masked, space_name)
    masks = random_masks(space)
    attach(masked, space).set_masks(masks)
    with torch.no_grad():
        for linear in space.linears:
            layer = zeroed.get_submodule(linear.path)
            if linear.rows is not None and linear.mask_rows:
                keep = masks[linear.rows.set][linear.rows.owner]
                layer.weight.mul_(keep[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(keep)
            if linear.cols is not None and linear.mask_cols:
                layer.weight.mul_(masks[linear.cols.set][linear.cols.owner])
    assert families.relative_error(families.logits(masked), families.logits(zeroed)) <= 1e-5


@every_case
def test_masks_gather_finite_gradients_of_every_set(family, space_name):
    model = families.with_lora(families.build(family))
    attachment = attach(model, _space(model, space_name))
    attachment.require_gradients(True)
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    for name, leaf in attachment.masks.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.abs().sum() > 0, name


def test_the_gradient_of_a_mask_is_the_loss_change_it_predicts():
    """Oracle: a central difference; the model computes norms and the loss in float32."""
    model = families.build("llama")
    attachment = attach(model, _space(model, "width"))
    attachment.require_gradients(True)
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    leaf = attachment.masks["1.mlp"]
    largest = int(leaf.grad.abs().argmax())
    predicted = leaf.grad[largest].item()
    losses = []
    for change in (0.02, -0.02):
        with torch.no_grad():
            leaf[largest] = 1.0 + change
            losses.append(model(input_ids=batch, labels=batch).loss.item())
    assert predicted == pytest.approx((losses[0] - losses[1]) / 0.04, rel=1e-2)


def test_checkpointing_gives_the_same_mask_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = families.with_lora(families.build("llama")).train()
        if checkpointing:
            families.checkpoint(model)
        attachment = attach(model, _space(model, "width"))
        attachment.require_gradients(True)
        batch = families.tokens()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append({name: leaf.grad for name, leaf in attachment.masks.items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_attaching_twice_is_refused():
    model = families.build("llama")
    attach(model, _space(model, "width"))
    with pytest.raises(UnsupportedModelError, match="is being pruned already"):
        attach(model, _space(model, "width"))


def test_a_layer_whose_forward_has_been_replaced_is_refused_and_nothing_is_touched():
    model = families.with_lora(families.build("llama"))
    classes = [type(m) for m in model.modules()]
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    add_hook_to_module(layer, ModelHook())
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj has been given .*without device_map"):
        attach(model, _space(model, "width"))
    assert [type(m) for m in model.modules()] == classes


def test_detaching_an_unattached_model_is_refused():
    with pytest.raises(ATPError, match="not attached"):
        detach(families.build("llama"))


def test_set_masks_writes_into_the_very_tensors_that_layers_read():
    model = families.build("llama")
    space = _space(model, "width")
    attachment = attach(model, space)
    leaves = dict(attachment.masks)
    attachment.set_masks(random_masks(space))
    assert all(attachment.masks[name] is leaf for name, leaf in leaves.items())
    decision = attachment.decision()
    attachment.set_masks(space.full())
    assert any(mask.min() == 0 for mask in decision.values())


def test_lora_weights_are_reached_through_the_masked_layer():
    model = families.with_lora(families.build("llama"))
    space = _space(model, "width")
    attachment = attach(model, space)
    for linear in space.linears:
        module = attachment.modules[linear.path]
        assert "default" in module.lora_A
        assert base_layer(module).weight.shape == (linear.out_features, linear.in_features)


def test_unloading_lora_under_masks_is_refused_and_free_again_after_detaching():
    model = families.with_lora(families.build("llama"))
    attach(model, _space(model, "width"))
    for unload in (model.merge_and_unload, model.unload):
        with pytest.raises(ATPError, match="would lose the masks"):
            unload()
    detach(model)
    model.merge_and_unload()
