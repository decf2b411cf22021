"""Ridge regression of a layer. Oracle: `torch.linalg.lstsq` in float64 of tokens and prior stacked as one system."""

import pytest
import torch

from atp.criteria.ridge import Ridge
from atp.criteria.surgeon import typical

OUT, IN, TOKENS = 5, 7, 40


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((OUT, IN), (OUT,), (TOKENS, IN), (TOKENS, OUT), (TOKENS, 1))
    weight, bias, x, target, counts = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight, bias, x, target, counts.abs()


def solution(weight, bias, x, target, counts, prior, with_bias):
    """Changes of weight and bias, from one stack of rows: tokens, then the pull on each weight."""
    x, target, weight, bias = (t.double() for t in (x, target, weight, bias))
    counts = counts.double()
    off = (target - x @ weight.T - bias) * counts
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, : IN + with_bias] * counts
    gram = (x * counts).T @ (x * counts)
    pull = (prior * typical(gram)).sqrt() * torch.eye(IN + with_bias)[:IN].double()
    return torch.linalg.lstsq(torch.cat([rows, pull]), torch.cat([off, off.new_zeros(IN, OUT)])).solution.T


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("prior", [0.0, 0.3])
@pytest.mark.parametrize("counted", [False, True])
def test_changes_are_the_solution_of_the_stacked_system(with_bias, prior, counted):
    weight, bias, x, target, counts = tensors()
    ridge = Ridge(weight, bias, with_bias)
    for rows in (slice(0, 13), slice(13, TOKENS)):
        ridge.add(x[rows][None], target[rows][None], counts[rows][None] if counted else None)
    change, shift = ridge.change(prior)
    ones = torch.ones_like(counts)
    expected = solution(weight, bias, x, target, counts if counted else ones, prior, with_bias)
    assert torch.allclose(change.double(), expected[:, :IN], atol=1e-4)
    assert (shift is None) == (not with_bias)
    if with_bias:
        assert torch.allclose(shift.double(), expected[:, IN], atol=1e-4)
