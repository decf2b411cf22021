"""A linear layer that reads some features and writes some, for the few tokens of a decoding step.

    y = scatter(W x[read] + b)

`gather_linear_scatter_eager` is the definition. One kernel does all of it for up to `MAX_TOKENS` tokens, whose time
goes into reading W. More tokens, and float64, are left to the definition. Not covered: gradients.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from atp.ops.implementation import uses_triton
from atp.ops.selection import Selection, gather_features, scatter_features

MAX_TOKENS = 64


def gather_linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    read: Selection | None = None,
    written: Selection | None = None,
    impl: str = "auto",
) -> Tensor:
    """scatter(W x[read] + b), `(..., written features)`, zero where a feature is gone.

    Args:
        x: `(..., in_features)`, before any selection; all tensors are of one dtype.
        weight: W, compact: `(features that stay of those written, features that are read)`.
        bias: b, compact like W's rows.
        read: which of `x`'s features W reads; None means all.
        written: which of the result's features W writes; None means that the result is compact too.
        impl: see `atp.ops.implementation`.

    Raises:
        RuntimeError: where a gradient would be needed.
        ValueError: on shapes that disagree, or an `impl` that cannot be had.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError("gather_linear_scatter has no gradient: call it under torch.no_grad()")
    _check_shapes(x, weight, bias, read, written)
    tokens = math.prod(x.shape[:-1])
    if not uses_triton(x, impl) or tokens > MAX_TOKENS or x.dtype == torch.float64:
        return gather_linear_scatter_eager(x, weight, bias, read=read, written=written)
    index = None if read is None else read.index
    position = None if written is None else written.position
    y = _gather_linear_scatter(x.reshape(tokens, x.shape[-1]), weight, bias, index, position)
    return y.view(*x.shape[:-1], y.shape[-1])


def gather_linear_scatter_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    read: Selection | None = None,
    written: Selection | None = None,
) -> Tensor:
    """The definition of `gather_linear_scatter`."""
    y = linear(x if read is None else gather_features(x, read.index), weight, bias)
    return y if written is None else scatter_features(y, written.index, len(written.position))


def _check_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, read: Selection | None, written: Selection | None
) -> None:
    features, inputs = (x.shape[-1],) * 2 if read is None else (read.position.shape[0], read.index.shape[0])
    outputs = weight.shape[0] if written is None else written.index.shape[0]
    if x.shape[-1] != features or weight.shape != (outputs, inputs) or (bias is not None and bias.shape != (outputs,)):
        found = [tuple(t.shape) for t in (x, weight, bias) if t is not None]
        raise ValueError(
            f"x, weight and bias are (..., {features}), ({outputs}, {inputs}) and ({outputs},), not {found}"
        )


@torch.library.custom_op("atp::gather_linear_scatter", mutates_args=())
def _gather_linear_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, read: Tensor | None, position: Tensor | None
) -> Tensor:
    from atp.ops.kernels import decode  # noqa: PLC0415 - triton is optional

    return decode.launch(x, weight, bias, read, position)


@_gather_linear_scatter.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - the operation's
    read: Tensor | None,  # noqa: ARG001
    position: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], (weight if position is None else position).shape[0])
