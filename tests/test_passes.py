"""Modes of modules. Oracle: each module's own mode, set by hand."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from atp.passes import evaluating, without_dropout
from tests import families


def mixed() -> nn.Module:
    """In training mode, but for its second half."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("within", [evaluating, without_dropout])
def test_every_module_gets_its_own_mode_back(within) -> None:
    model = mixed()
    before = modes(model)
    with suppress(ZeroDivisionError), within(model):
        assert modes(model) != before
        raise ZeroDivisionError
    assert modes(model) == before


def test_a_model_is_evaluated_as_a_whole() -> None:
    model = mixed()
    with evaluating(model):
        assert not any(modes(model))


def test_without_dropout_the_model_itself_makes_what_it_makes_in_training() -> None:
    """Liger makes no logits then."""
    model = mixed()
    with without_dropout(model):
        assert modes(model) == [True, *[False] * 6]


def test_without_dropout_checkpointing_still_computes_again() -> None:
    model = families.build("llama")
    families.checkpoint(model)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = families.tokens()
    with without_dropout(model):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("drops", [{"lora": 0.3, "attention": 0.0}, {"lora": 0.0, "attention": 0.3}])
def test_without_dropout_a_model_in_training_mode_gives_what_it_gives_in_evaluation(drops) -> None:
    model = families.with_lora(families.build("llama"), lora_dropout=drops["lora"])
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = drops["attention"]
    ids = families.tokens()
    truth = model.eval()(input_ids=ids).logits
    assert not torch.equal(model.train()(input_ids=ids).logits, truth)
    with without_dropout(model):
        assert torch.equal(model(input_ids=ids).logits, truth)
