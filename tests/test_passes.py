"""Modes of modules. Oracle: each module's own mode, set by hand."""

from contextlib import suppress

import pytest
from torch import nn

from atp.passes import evaluating, without_dropout


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


def test_without_dropout_all_else_is_in_training_mode() -> None:
    model = mixed()
    with without_dropout(model):
        assert all(module.training != isinstance(module, nn.Dropout) for module in model.modules())
