"""Head-wise rotations of values. Oracles: the model's own logits, and what pruning costs it."""

import copy

import pytest
import torch

from atp import rotation
from atp.errors import CalibrationError, UnsupportedModelError
from atp.rotation import rotate_values
from tests import families
from tests.export.cases import PACKED

BATCHES = [{"input_ids": ids, "labels": ids} for ids in (families.tokens(seed=seed) for seed in range(3))]


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in PACKED])
def test_the_model_computes_what_it_did(family):
    model = families.build(family)
    before, state = families.logits(model), copy.deepcopy(model.state_dict())
    assert rotate_values(model, BATCHES) <= 1e-5
    assert families.relative_error(families.logits(model), before) <= 1e-5
    changed = {
        name.split(".")[-2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])
    }
    assert changed == {"v_proj", "o_proj"}


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "llama_biases", "gemma3"])
def test_the_first_dimensions_are_worth_most(family):
    """The loss that is left without the first, and without the last, dimensions of every head."""
    model = families.build(family)
    rotate_values(model, BATCHES)

    def without(kept: slice) -> float:
        pruned = copy.deepcopy(model)
        for layer in pruned.model.layers:
            size = layer.self_attn.head_dim
            mask = torch.zeros(size)
            mask[kept] = 1.0
            weight = layer.self_attn.o_proj.weight
            weight.data *= mask.repeat(weight.shape[1] // size)
        error = [(pruned(**b).logits - model(**b).logits).square().mean() for b in BATCHES]
        return torch.stack(error).sum().item()

    half = model.model.layers[0].self_attn.head_dim // 2
    assert without(slice(half)) < 0.5 * without(slice(half, None))


def test_bfloat16_stays_and_moves_by_rounding():
    model = families.build("llama").to(torch.bfloat16)
    assert 0 < rotate_values(model, BATCHES) <= 5e-2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_attention_that_is_not_linear_in_its_values_is_left_as_it_was():
    model = families.build("llama_biases")
    reader = model.model.layers[1].self_attn.v_proj
    reader.register_forward_hook(lambda _m, _a, y: y.tanh())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="moves its logits by .* not linear in them"):
        rotate_values(model, BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_batches_it_says_so_and_any_iterable_of_them_will_do():
    found = []
    for batches in (BATCHES, iter(BATCHES)):
        model = families.build("llama")
        rotate_values(model, batches)
        found.append(model.model.layers[1].self_attn.v_proj.weight)
    assert torch.equal(*found)
    with pytest.raises(CalibrationError, match="no batches to rotate values by"):
        rotate_values(families.build("llama"), [])


def test_what_ends_it_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = families.build("llama")
    before, turn, turned = copy.deepcopy(model.state_dict()), rotation._turn, []

    def once(*args):
        if turned:
            raise KeyboardInterrupt
        turned.append(turn(*args))

    monkeypatch.setattr(rotation, "_turn", once)
    with pytest.raises(KeyboardInterrupt):
        rotate_values(model, BATCHES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_logits_that_are_not_finite_are_called_so():
    model = families.build("llama")
    model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(UnsupportedModelError, match=r"logits are not finite in torch\.float32: use another dtype"):
        rotate_values(model, BATCHES)


def test_layers_under_lora_and_packed_ones_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"v_proj is quantised or adapted: rotate the values of the plain"):
        rotate_values(families.with_lora(families.build("llama")).get_base_model(), BATCHES)
    with pytest.raises(UnsupportedModelError, match="packs values with others"):
        rotate_values(families.build("phi3"), BATCHES)
