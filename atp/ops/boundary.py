"""What lies between two blocks of a model: residual add, RMSNorm (arXiv 1910.07467) and the choice of features.

    r' = r + scatter(m u)
    n = gather(r' / sqrt(mean(r'^2) + eps) (offset + w))

`add_norm_gather_eager` is the definition. r' is rounded to the residual's dtype before the norm reads it, and n only at
the end, where Llama's own norm is also rounded ahead of w. Kernels read and write each row once, forwards and
backwards, and keep r' alone. They cover neither second derivatives nor float64, which is left to the definition; no one
covers LayerNorm.
"""

from typing import Any

import torch
from torch import Tensor

from atp.ops.implementation import uses_triton
from atp.ops.selection import Selection, gather_features, scatter_features


def add_norm_gather(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    written: Selection | None = None,
    update_mask: Tensor | None = None,
    read: Selection | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r' and n, computed in float32 and returned in the residual's dtype.

    A soft mask on n needs no argument: the caller multiplies it into gamma, `weight=(offset + w) * mask, offset=0`.

    Args:
        residual: r, `(..., hidden_size)`.
        update: u, what attention or an MLP wrote, `(..., hidden_size)`, or `(..., len(written.index))`; with None, r'
            is `residual` itself.
        weight: w, the norm's gamma, `(hidden_size,)`, of any float dtype.
        offset: 1 for a norm that holds gamma less 1, as Gemma's do.
        written: the features that `update` consists of; None for all.
        update_mask: m, soft or hard, as long as `update`'s last dimension, of any float dtype; None for ones.
        read: the features of n that are returned, `(..., len(read.index))`; None for all.
        impl: see `atp.ops.implementation`.

    Raises:
        ValueError: on shapes that disagree, or an `impl` that cannot be had.
    """
    _check(residual, update, weight, written, update_mask, read)
    if not uses_triton(residual, impl) or residual.dtype == torch.float64:
        return add_norm_gather_eager(
            residual, update, weight, eps, offset=offset, written=written, update_mask=update_mask, read=read
        )
    summed, normed = _add_norm_gather(
        residual,
        update,
        read and read.index,
        read and read.position,
        written and written.index,
        written and written.position,
        weight,
        update_mask,
        eps,
        offset,
    )
    return residual if update is None else summed, normed


def add_norm_gather_eager(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    written: Selection | None = None,
    update_mask: Tensor | None = None,
    read: Selection | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `add_norm_gather`."""
    precise = torch.promote_types(residual.dtype, torch.float32)
    summed = residual
    if update is not None:
        added = update.to(precise) if update_mask is None else update.to(precise) * update_mask.to(precise)
        if written is not None:
            added = scatter_features(added, written.index, residual.shape[-1])
        summed = (residual.to(precise) + added).to(residual.dtype)
    r = summed.to(precise)
    normed = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps) * (offset + weight.to(precise))
    normed = normed.to(residual.dtype)
    return summed, normed if read is None else gather_features(normed, read.index)


def _check(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    written: Selection | None,
    update_mask: Tensor | None,
    read: Selection | None,
) -> None:
    *batch, hidden_size = residual.shape
    width = hidden_size if written is None else written.index.shape[0]
    expected = {
        "weight": (weight, (hidden_size,)),
        "update": (update, (*batch, width)),
        "update_mask": (update_mask, (width,)),
        "written.position": (None if written is None else written.position, (hidden_size,)),
        "read.position": (None if read is None else read.position, (hidden_size,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}: {shape} beside a residual {tuple(residual.shape)}"
            )
    if update is None and (written is not None or update_mask is not None):
        raise ValueError("written and update_mask: only with an update")


@torch.library.custom_op("atp::add_norm_gather", mutates_args=())
def _add_norm_gather(
    residual: Tensor,
    update: Tensor | None,
    read_index: Tensor | None,
    read_position: Tensor | None,  # noqa: ARG001 - for the backward pass, as written_index is
    written_index: Tensor | None,  # noqa: ARG001
    written_position: Tensor | None,
    weight: Tensor,
    update_mask: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """r' and n. An operation may not return what it was given: without an update, r' is empty."""
    from atp.ops.kernels import boundary as kernels  # noqa: PLC0415 - triton is optional

    return kernels.forward(residual, update, update_mask, written_position, weight, read_index, eps, offset)


@torch.library.custom_op("atp::add_norm_gather_backward", mutates_args=())
def _add_norm_gather_backward(
    of_summed: Tensor | None,
    of_normed: Tensor,
    summed: Tensor,
    weight: Tensor,
    read_position: Tensor | None,
    update: Tensor | None,
    update_mask: Tensor | None,
    written_index: Tensor | None,
    eps: float,
    offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `residual`, `update`, `weight` and `update_mask`, or empty tensors: see the kernels' `backward`."""
    from atp.ops.kernels import boundary as kernels  # noqa: PLC0415 - triton is optional

    return kernels.backward(
        of_summed,
        of_normed,
        summed,
        weight,
        read_position,
        update,
        update_mask,
        written_index,
        eps,
        offset,
        needs_weight,
    )


@_add_norm_gather.register_fake
def _(residual: Tensor, update: Tensor | None, read_index: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    *batch, hidden_size = residual.shape
    read = hidden_size if read_index is None else read_index.shape[0]
    return residual.new_empty((0,) if update is None else residual.shape), residual.new_empty((*batch, read))


@_add_norm_gather_backward.register_fake
def _(
    _of_summed: Tensor | None,
    _of_normed: Tensor,
    summed: Tensor,
    weight: Tensor,
    _read_position: Tensor | None,
    update: Tensor | None,
    update_mask: Tensor | None,
    written_index: Tensor | None,
    _eps: float,
    _offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow = update_mask if written_index is None else written_index
    return (
        summed.new_empty(summed.shape),
        summed.new_empty((0,) if narrow is None else (*summed.shape[:-1], narrow.shape[0])),
        weight.new_empty(weight.shape) if needs_weight else summed.new_empty(0),
        summed.new_empty(0) if update is None or update_mask is None else update_mask.new_empty(update_mask.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, update, _, read_position, written_index, _, weight, update_mask, ctx.eps, ctx.offset = inputs
    ctx.needs_weight, needs_mask = ctx.needs_input_grad[6:8]
    ctx.has_update = update is not None
    summed = residual if update is None else output[0]
    kept_update = update if needs_mask else None
    ctx.save_for_backward(summed, weight, read_position, kept_update, update_mask, written_index)


def _backward(ctx: Any, of_summed: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
    saved = _, _, _, update, update_mask, written_index = ctx.saved_tensors
    of_residual, of_update, of_weight, of_mask = _add_norm_gather_backward(
        of_summed if ctx.has_update else None,
        of_normed,
        *saved,
        ctx.eps,
        ctx.offset,
        ctx.needs_weight,
    )
    if update_mask is None and written_index is None:
        of_update = of_residual
    return (
        of_residual,
        of_update if ctx.has_update else None,  # which autograd rounds, where it is of another dtype
        None,
        None,
        None,
        None,
        of_weight if ctx.needs_weight else None,
        None if update is None else of_mask,
        None,
        None,
    )


_add_norm_gather.register_autograd(_backward, setup_context=_setup_context)
