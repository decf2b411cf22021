"""A mask on one side of a layer. Oracle: the product and its gradients in float64."""

import pytest
import torch

from atp.layers.fused import FusedMasks, _added
from atp.layers.masked import AxisMask
from atp.structure.space import MLP_OUT, Axis


@pytest.mark.parametrize("units", [1, 4])
def test_a_masks_gradient_may_be_larger_than_float16_holds(units):
    """It is a sum over tokens, and times a gradient scaler's scale."""
    groups = 12 // units
    axis = Axis("set", torch.arange(groups).repeat_interleave(units), units)
    leaf = torch.rand(groups, requires_grad=True)
    x = (torch.rand(2, 500, 12) * 30).half().requires_grad_()
    gradient = (torch.rand(2, 500, 12) * 30).half()
    AxisMask.of(axis, leaf).apply(x).backward(gradient)
    expected = leaf.detach().half()[axis.owner]
    assert torch.equal(x.grad, gradient * expected)
    by_feature = (gradient.double() * x.detach().double()).sum((0, 1))
    exact = torch.zeros(groups, dtype=torch.float64).index_add(0, axis.owner, by_feature)
    assert exact.min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=0)


def test_that_of_a_fused_layer_too():
    leaf = torch.rand(12, requires_grad=True)
    update = (torch.rand(2, 500, 12) * 30).half()
    gradient = (torch.rand(2, 500, 12) * 30).half()
    _added(FusedMasks({MLP_OUT: leaf}, {}, "eager"), torch.zeros_like(update), update).backward(gradient)
    exact = (gradient.double() * update.double()).sum((0, 1))
    assert exact.min() > torch.finfo(torch.float16).max
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=0)
