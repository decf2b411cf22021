"""A frozen linear layer and its LoRA adapter (arXiv 2106.09685) as one operation.

    y = W x + b + s B (A x)

`lora_linear_eager` is the definition. What adapters add is accumulated into the base layer's output, and into its
input's gradient, by the product itself (BLAS's beta = 1), so that no full-size summand is written, scaled and added:
one pass over the output less forwards, and one over the input backwards. Where W is itself computed (a part of a larger
matrix), it is made for the forward pass and again for the backward one, and never lives in between. Not covered:
gradients of W and b, which are frozen; second derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

Weight = Tensor | Callable[[], Tensor]
"""W, `(out_features, in_features)`, or what makes it, the same each time."""


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """W x + b, `(..., out_features)`, for W and b that are frozen."""
    if torch.is_tensor(weight) or torch.compiler.is_compiling():
        return linear(x, _made(weight), bias)
    return _FrozenLinear.apply(x, weight, bias)


def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """W x + b + s B (A x), `(..., out_features)`.

    Args:
        x: `(..., in_features)`; all tensors are of one dtype.
        weight: W, frozen.
        lora_a: A, `(rank, in_features)`.
        lora_b: B, `(out_features, rank)`.
        scaling: s.
    """
    if torch.compiler.is_compiling():  # which fuses what it can by itself
        return lora_linear_eager(x, _made(weight), bias, lora_a, lora_b, scaling)
    rows = x.shape[:-1].numel()  # not -1: where every group of a block is gone, x has no features
    y = _LoRALinear.apply(x.reshape(rows, x.shape[-1]), weight, bias, lora_a, lora_b, scaling)
    return y.view(*x.shape[:-1], len(lora_b))  # here, so that what comes out may be changed in place


def lora_linear_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """The definition of `lora_linear`."""
    return linear(x, weight, bias) + linear(linear(x, lora_a), lora_b) * scaling


def _made(weight: Weight) -> Tensor:
    return weight if torch.is_tensor(weight) else weight()


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, weight(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ ctx.weight(), None, None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        inner = x @ lora_a.T
        ctx.save_for_backward(x, inner, lora_a, lora_b, weight if torch.is_tensor(weight) else None)
        ctx.weight, ctx.scaling = None if torch.is_tensor(weight) else weight, scaling
        return linear(x, _made(weight), bias).addmm_(inner, lora_b.T, alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, lora_a, lora_b, weight = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        of_inner = (gradient @ lora_b).mul_(ctx.scaling)
        return (
            (gradient @ (ctx.weight() if weight is None else weight)).addmm_(of_inner, lora_a) if of_x else None,
            None,
            None,
            of_inner.T @ x if of_a else None,
            (gradient.T @ inner).mul_(ctx.scaling) if of_b else None,
            None,
        )
