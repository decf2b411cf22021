"""Held-out figures of the dense and the pruned model. Oracle: unmasked models, by a sum over label tokens."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq

from atp.data import IGNORED
from atp.training.held_out import HeldOut
from tests import tiny
from tests.runs import worst
from tests.training.test_compensation import attached

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [IGNORED, IGNORED, 7, 8, 9, 10]},
    {"input_ids": [11, 12, 13], "labels": [11, 12, 13]},
    {"input_ids": [20, 21, 22, 23], "labels": [IGNORED] * 4},
]


def by_hand(model):
    total, tokens = 0.0, 0
    for row in ROWS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        total += cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        tokens += int((labels != IGNORED).sum())
    return total / tokens


def held_out(model, attachment, compensation, batch_size=2):
    return HeldOut(model, attachment, compensation, ROWS, DataCollatorForSeq2Seq(tiny.tokenizer()), batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("how", ["follow", "weights", "bias"])
@pytest.mark.parametrize("space", ["width", "disp", "hidden+depth"])
def test_dense_is_the_model_before_anything_was_pruned_or_refitted(space, how, batch_size):
    if how == "bias" and space == "hidden+depth":
        pytest.skip("biases have no place in `hidden`")
    model, attachment, decision, compensation = attached(space, how)
    dense = by_hand(model)
    attachment.set_masks(decision)
    compensation.apply(decision, attachment.space.full())
    watched = held_out(model, attachment, compensation, batch_size)
    assert watched.pruned() == pytest.approx(by_hand(model), rel=1e-5)
    assert watched.dense() == pytest.approx(dense, rel=1e-5)
    assert abs(watched.pruned() - dense) > 1e-4


def test_nothing_is_left_of_having_looked():
    model, attachment, decision, compensation = attached("width", "follow")
    attachment.set_masks(decision)
    compensation.apply(decision, attachment.space.full())
    model.train()
    model.base_model.eval()
    attachment.require_gradients(True)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    gradients = {name: leaf.grad.clone() for name, leaf in attachment.masks.items()}
    weights, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    held_out(model, attachment, compensation).dense()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert worst(model.state_dict(), weights) == 0
    assert all(torch.equal(attachment.masks[name].grad, gradient) for name, gradient in gradients.items())
    assert all(torch.equal(attachment.masks[name], decision[name]) for name in decision)
