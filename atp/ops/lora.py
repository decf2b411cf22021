"""A frozen linear layer and its LoRA adapter (arXiv 2106.09685) as one operation.

    y = W x + b + s B (A x)

`lora_linear_eager` is the definition. What adapters add is accumulated into the base layer's output, and into its
input's gradient, by the product itself (BLAS's beta = 1), so that no full-size summand is written, scaled and added:
one pass over the output less forwards, and one over the input backwards. Not covered: gradients of W and b, which are
frozen; second derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """W x + b + s B (A x), `(..., out_features)`.

    Args:
        x: `(..., in_features)`; all tensors are of one dtype.
        weight: W, `(out_features, in_features)`, frozen.
        lora_a: A, `(rank, in_features)`.
        lora_b: B, `(out_features, rank)`.
        scaling: s.
    """
    if torch.compiler.is_compiling():  # which fuses what it can by itself
        return lora_linear_eager(x, weight, bias, lora_a, lora_b, scaling)
    y = _LoRALinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, lora_a, lora_b, scaling)
    return y.view(*x.shape[:-1], len(weight))  # here, so that what comes out may be changed in place


def lora_linear_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """The definition of `lora_linear`."""
    return linear(x, weight, bias) + linear(linear(x, lora_a), lora_b) * scaling


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        inner = x @ lora_a.T
        ctx.save_for_backward(x, inner, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(inner, lora_b.T, alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, lora_a, lora_b = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        of_inner = (gradient @ lora_b).mul_(ctx.scaling)
        return (
            (gradient @ weight).addmm_(of_inner, lora_a) if of_x else None,
            None,
            None,
            of_inner.T @ x if of_a else None,
            (gradient.T @ inner).mul_(ctx.scaling) if of_b else None,
            None,
        )
