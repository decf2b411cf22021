"""The kept rows and columns of a weight, or of LoRA's A or B, as a smaller matrix.

    y = W[rows][:, cols]

`compact_weight_eager` is the definition. With kernels the gradient is the same operation along the inverse maps: an
entry of W gets the gradient of the one place it went to, or zero. Nothing is summed, so every run agrees in every bit.
Not covered: a buffer larger than the result.
"""

from typing import Any

import torch
from torch import Tensor

from atp.ops.implementation import uses_triton
from atp.ops.selection import Selection


def compact_weight(
    weight: Tensor,
    rows: Selection | None = None,
    cols: Selection | None = None,
    out: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """W[rows][:, cols], `(kept rows, kept columns)`: a new tensor, or `out`.

    Args:
        weight: W, `(out_features, in_features)`, with any strides.
        rows: which rows stay; None keeps all.
        cols: which columns stay; None keeps all.
        out: of the result's shape and `weight`'s dtype, with any strides; no gradient flows through it.
        impl: see `atp.ops.implementation`.

    Raises:
        ValueError: where a selection is not of the weight's size, `out` not of the result's shape and dtype, or `impl`
            cannot be had.
    """
    shape = _kept_shape(weight, rows, cols)
    if out is not None and (out.shape != shape or out.dtype != weight.dtype):
        raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}, and what is kept {shape}, {weight.dtype}")
    kernels = uses_triton(weight, impl)
    if out is None:
        return _compact(weight, *_maps(rows), *_maps(cols)) if kernels else compact_weight_eager(weight, rows, cols)
    with torch.no_grad():
        if kernels:
            _compact_into(weight, _maps(rows)[0], _maps(cols)[0], out)
        else:
            out.copy_(compact_weight_eager(weight, rows, cols))
    return out


def compact_weight_eager(weight: Tensor, rows: Selection | None = None, cols: Selection | None = None) -> Tensor:
    """The definition of `compact_weight`."""
    if rows is None and cols is None:
        return weight.clone()
    kept = weight if rows is None else weight.index_select(0, rows.index)
    return kept if cols is None else kept.index_select(1, cols.index)


def _kept_shape(weight: Tensor, rows: Selection | None, cols: Selection | None) -> tuple[int, int]:
    sides = zip((rows, cols), weight.shape, strict=True)
    chosen = [(None, n) if s is None else (s, s.position.shape[0]) for s, n in sides]
    if tuple(n for _, n in chosen) != weight.shape:
        raise ValueError(f"rows and cols select from {tuple(n for _, n in chosen)}, of a weight {tuple(weight.shape)}")
    n_rows, n_cols = (n if s is None else s.index.shape[0] for s, n in chosen)  # `len` would make a graph for each
    return n_rows, n_cols


def _maps(selection: Selection | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if selection is None else (selection.index, selection.position)


@torch.library.custom_op("atp::compact_weight", mutates_args=())
def _compact(
    source: Tensor,
    rows: Tensor | None,
    rows_back: Tensor | None,  # noqa: ARG001 - its gradient's
    cols: Tensor | None,
    cols_back: Tensor | None,  # noqa: ARG001
) -> Tensor:
    """source[rows][:, cols], and zeros where an index is -1. The gradient goes the way of the maps back."""
    from atp.ops.kernels import compaction  # noqa: PLC0415 - triton is optional

    return compaction.gather(source, rows, cols)


@_compact.register_fake
def _(
    source: Tensor,
    rows: Tensor | None,
    rows_back: Tensor | None,  # noqa: ARG001 - the operation's
    cols: Tensor | None,
    cols_back: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return source.new_empty([n if i is None else i.shape[0] for i, n in zip((rows, cols), source.shape, strict=True)])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, rows_back, cols, cols_back = ctx.saved_tensors
    return _compact(gradient, rows_back, rows, cols_back, cols), None, None, None, None


_compact.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("atp::compact_weight_into", mutates_args={"out"})
def _compact_into(source: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    from atp.ops.kernels import compaction  # noqa: PLC0415 - triton is optional

    compaction.gather(source, rows, cols, out)


@_compact_into.register_fake
def _(source: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    pass
