"""One tensor read by several layers is masked or gathered once. Oracle: every layer doing it for itself."""

import weakref
from contextlib import nullcontext

import pytest
import torch

from atp.layers import attach
from atp.layers.shared import Shared
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import random_masks


class Doubling:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * 2


def test_computed_once_for_all_readers_and_dropped_after_the_last():
    shared, double, x = Shared(3), Doubling(), torch.ones(2)
    first = shared.of(x, double)
    assert shared.of(x, double) is first
    assert shared.of(x, double) is first
    assert double.calls == 1
    gone, here = weakref.ref(first), weakref.ref(x)
    del first, x
    assert gone() is None
    assert here() is None


@pytest.mark.parametrize("change", ["another tensor", "in place", "state", "no gradients", "inference mode"])
def test_computed_anew_where_anything_is_different(change):
    shared, double, x = Shared(3), Doubling(), torch.ones(2)
    shared.of(x, double, 0)
    if change == "another tensor":
        x = torch.ones(2)
    elif change == "in place":
        x += 1
    modes = {"no gradients": torch.no_grad, "inference mode": torch.inference_mode}
    with modes.get(change, nullcontext)():
        x = x.clone() if change == "inference mode" else x
        y = shared.of(x, double, 1 if change == "state" else 0)
    assert torch.equal(y, x * 2)
    assert double.calls == 2


def _attached(compact):
    """In `disp`, under random hard masks."""
    model = families.with_lora(families.build("llama"))
    attachment = attach(model, build_space(discover(model), "disp"))
    attachment.set_masks(random_masks(attachment.space, 0.4))
    if compact:
        attachment.compact()
    return model, attachment


@pytest.mark.parametrize("compact", [False, True])
def test_each_half_of_a_block_prepares_its_input_once(compact, monkeypatch):
    """In `disp`; logits and LoRA's gradients are what they are without sharing."""
    model, attachment = _attached(compact)
    calls = []
    of = Shared.of

    def counted(self, x, compute, state=None):
        return of(self, x, lambda x: calls.append(1) or compute(x), state)

    monkeypatch.setattr(Shared, "of", counted)
    found = _logits_and_gradients(model)
    at_once = len(calls)
    calls.clear()
    monkeypatch.setattr(Shared, "of", lambda self, x, compute, state=None: calls.append(1) or compute(x))
    expected = _logits_and_gradients(model)
    blocks = len(attachment.space.structure.blocks)
    forwards, spared = 2, 3  # of q, k and v two, of gate and up one
    assert len(calls) - at_once == forwards * blocks * spared
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_compiles_into_one_graph(compact):
    model, _ = _attached(compact)
    expected = families.logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(input_ids=families.tokens(), use_cache=False).logits, expected, atol=1e-5)


def test_another_decision_is_seen_by_readers_that_had_not_all_asked():
    _, attachment = _attached(compact=False)
    reader = attachment.modules["model.layers.0.self_attn.q_proj"]
    x = torch.randn(1, 3, reader.in_features)
    found = []
    for seed in (0, 1):
        attachment.set_masks(random_masks(attachment.space, 0.4, seed))
        attachment.compact()
        found.append(reader(x))
    attachment.set_masks(attachment.decision())
    assert torch.allclose(found[1], reader(x), atol=1e-5)


def _logits_and_gradients(model):
    model.zero_grad()
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    return [families.logits(model), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
