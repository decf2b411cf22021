"""LoRA as one operation. Oracle: its eager definition, in float64."""

from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from atp.ops.lora import frozen_linear, lora_linear, lora_linear_eager
from tests import families

SHAPES = [(1, 1, 3, 5, 1), (2, 3, 7, 4, 2), (1, 17, 12, 33, 4)]
"""Rows, tokens, inputs, outputs, rank."""


def arguments(rows, tokens, inputs, outputs, rank, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    made = [torch.randn(size, dtype=dtype) for size in ((rows, tokens, inputs), (outputs, inputs), (outputs,))]
    made += [torch.randn(size, dtype=dtype) for size in ((rank, inputs), (outputs, rank))]
    x, weight, b, lora_a, lora_b = made
    return (x.requires_grad_(), weight, b if bias else None, lora_a.requires_grad_(), lora_b.requires_grad_(), 0.7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_finite_differences(shape, bias):
    assert torch.autograd.gradcheck(lora_linear, arguments(*shape, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_precise_than_the_definition(shape, dtype):
    """In the same format, against float64: values and gradients."""
    low = arguments(*shape, dtype=dtype)
    high = [t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in low]
    errors = {}
    exact = results(lora_linear_eager, high)
    for function in (lora_linear, lora_linear_eager):
        found = results(function, low)
        errors[function] = [families.relative_error(f.double(), e) for f, e in zip(found, exact, strict=True)]
    slack = torch.finfo(dtype).eps
    assert all(a <= b + slack for a, b in zip(errors[lora_linear], errors[lora_linear_eager], strict=True))


def results(function, given):
    leaves = [t for t in given if torch.is_tensor(t) and t.requires_grad]
    y = function(*given)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def test_inputs_that_need_no_gradient_get_none():
    x, weight, bias, lora_a, lora_b, scaling = arguments(*SHAPES[1])
    y = lora_linear(x.detach(), weight, bias, lora_a, lora_b.detach(), scaling)
    [of_a] = torch.autograd.grad(y.sum(), [lora_a])
    expected = torch.autograd.grad(lora_linear_eager(x, weight, bias, lora_a, lora_b, scaling).sum(), [lora_a])
    assert torch.allclose(of_a, *expected)


class Made:
    """Makes a weight, and counts how often."""

    def __init__(self, weight):
        self.weight, self.times = weight, 0

    def __call__(self):
        self.times += 1
        return self.weight.clone()


def test_a_weight_that_is_made_is_made_for_each_pass_and_not_kept():
    x, weight, bias, *rest = arguments(*SHAPES[1])
    for function, definition, others in ((lora_linear, lora_linear_eager, rest), (frozen_linear, linear, [])):
        made, kept = Made(weight), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.shape), t)[1], lambda t: t):
            y = function(x, made, bias, *others)
        assert made.times == 1
        assert weight.shape not in kept
        found = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        assert made.times == 2
        expected = results(definition, (x, weight, bias, *others))
        assert torch.allclose(y, expected[0])
        assert torch.allclose(found, expected[1])


@pytest.mark.parametrize("made", [False, True])
def test_compiles_into_one_graph(made):
    x, weight, *rest = arguments(*SHAPES[2], dtype=torch.float32)
    given = (x, partial(torch.clone, weight) if made else weight, *rest)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, given), results(lora_linear_eager, (x, weight, *rest)), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
