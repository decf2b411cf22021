"""Residual add, RMSNorm and the choice of features, a row at a time. Definition: `atp.ops.boundary`.

A row lies in registers, where `tl.gather` spreads kept features over all of them and draws kept features from all. So
every output has one writer, without atomics, and rows of kept features move 16 bytes at a time like whole ones (where
their number is a multiple of 16; others are right, and slower). What all rows share (gamma, masks, indices) is read
again for each of them from L1, which is asked to keep it: held in registers, backwards, it would spill at a hidden size
of 8192. All arithmetic is in float32.
"""
# mypy: allow-untyped-defs
# (a kernel's arguments have no types of Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

_MULTIPROCESSORS = 132
"""An H100's. A constant, for sums over rows to be in one order, and the same in every bit, on all GPUs."""


def forward(
    residual: Tensor,
    update: Tensor | None,
    update_mask: Tensor | None,
    written_position: Tensor | None,
    weight: Tensor,
    read_index: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """r', empty where there is no update, and n."""
    hidden_size = len(weight)
    written = hidden_size if update is None else update.shape[-1]
    read = hidden_size if read_index is None else len(read_index)
    summed = _empty(residual, *((0,) if update is None else residual.shape))
    normed = _empty(residual, *residual.shape[:-1], read)
    with torch.cuda.device_of(residual):
        forward_kernel[(residual.numel() // hidden_size,)](
            residual.contiguous(),
            _contiguous(update),
            _contiguous(update_mask),
            written_position,
            weight.contiguous(),
            read_index,
            summed,
            normed,
            written,
            read,
            eps,
            offset,
            **launch_options(hidden_size, written, read),
        )
    return summed, normed


def backward(
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
    """Gradients of residual, update, gamma and update mask.

    Empty are those of an update whose gradient is the residual's, of gamma unless needed, of a mask without `update`.
    """
    hidden_size, read = len(weight), of_normed.shape[-1]
    rows = summed.numel() // hidden_size
    narrow = update_mask if written_index is None else written_index
    written = hidden_size if narrow is None else len(narrow)
    options = launch_options(hidden_size, written, read)
    programs = min(rows, resident_programs(options["num_warps"], sums=needs_weight or update is not None))
    of_residual = _empty(summed, *summed.shape)
    of_update = None if narrow is None else _empty(summed, *summed.shape[:-1], written)
    of_weight = _empty(summed, programs, hidden_size, dtype=torch.float32) if needs_weight else None
    of_mask = None if update is None else _empty(summed, programs, written, dtype=torch.float32)
    with torch.cuda.device_of(summed):
        backward_kernel[(programs,)](
            _contiguous(of_summed),
            of_normed.contiguous(),
            summed.contiguous(),
            weight.contiguous(),
            read_position,
            _contiguous(update),
            _contiguous(update_mask),
            written_index,
            of_residual,
            of_update,
            of_weight,
            of_mask,
            rows,
            written,
            read,
            eps,
            offset,
            **options,
        )
    none = _empty(summed, 0)
    return (
        of_residual,
        none if of_update is None else of_update,
        none.clone() if of_weight is None else of_weight.sum(0).to(weight.dtype),
        none.clone() if of_mask is None or update_mask is None else of_mask.sum(0).to(update_mask.dtype),
    )


def launch_options(hidden_size: int, written: int, read: int) -> dict[str, int]:
    """Block sizes and warps: 16 features to a thread, which are two accesses of 16 bytes in bfloat16."""
    block = triton.next_power_of_2(hidden_size)
    return {
        "hidden_size": hidden_size,
        "block": block,
        "block_written": triton.next_power_of_2(max(written, 1)),
        "block_read": triton.next_power_of_2(max(read, 1)),
        "num_warps": min(max(block // 512, 1), 16),
    }


def resident_programs(num_warps: int, sums: bool) -> int:
    """What registers hold at once, for few partial sums: 32 warps on each multiprocessor, or 16 that keep sums."""
    return _MULTIPROCESSORS * (16 if sums else 32) // num_warps


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit
def forward_kernel(
    residual,
    update,
    update_mask,
    written_position,
    weight,
    read_index,
    summed,
    normed,
    written,
    read,
    eps,
    offset,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
    block_written: tl.constexpr,
    block_read: tl.constexpr,
):
    """A program per row. `update`, `update_mask`, `written_position` and `read_index` may be None."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < hidden_size
    x = load_once(residual + row * hidden_size, column, inside).to(tl.float32)
    if update is not None:
        kept = tl.arange(0, block_written)
        added = load_once(update + row * written, kept, kept < written)
        if update_mask is not None:
            added = added.to(tl.float32) * load_shared(update_mask, kept, kept < written).to(tl.float32)
        if written_position is not None:
            added = spread(added, load_shared(written_position, column, inside), inside)
        rounded = (x + added.to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + row * hidden_size + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    gamma = offset + load_shared(weight, column, inside).to(tl.float32)
    n = (x * tl.rsqrt(tl.sum(x * x) / hidden_size + eps) * gamma).to(normed.dtype.element_ty)
    chosen = tl.arange(0, block_read)
    if read_index is not None:
        n = tl.gather(n, load_shared(read_index, chosen, chosen < read).to(tl.int32), 0)
    tl.store(normed + row * read + chosen, n, mask=chosen < read)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    of_summed,
    of_normed,
    summed,
    weight,
    read_position,
    update,
    update_mask,
    written_index,
    of_residual,
    of_update,
    of_weight,
    of_mask,
    rows,
    written,
    read,
    eps,
    offset,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
    block_written: tl.constexpr,
    block_read: tl.constexpr,
):
    """A program takes every `num_programs`-th row. Of `of_weight` and `of_mask` it writes one row: its sums over those.

    None may be `of_summed`, where r' was not used; `read_position`, `update_mask` and `written_index`; every output but
    the first; and `update`, which only `of_mask` needs.
    """
    column = tl.arange(0, block)
    inside = column < hidden_size
    chosen = tl.arange(0, block_read)
    kept = tl.arange(0, block_written)
    weight_sum = tl.zeros([block], tl.float32)
    mask_sum = tl.zeros([block_written], tl.float32)
    for start in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(start, tl.int64)
        x = load_once(summed + row * hidden_size, column, inside).to(tl.float32)
        g = load_once(of_normed + row * read, chosen, chosen < read)
        if read_position is not None:
            g = spread(g, load_shared(read_position, column, inside), inside)
        g = g.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x) / hidden_size + eps)
        x *= scale
        if of_weight is not None:
            weight_sum += g * x
        g *= offset + load_shared(weight, column, inside).to(tl.float32)
        g = scale * (g - x * (tl.sum(g * x) / hidden_size))
        if of_summed is not None:
            g += load_once(of_summed + row * hidden_size, column, inside).to(tl.float32)
        rounded = g.to(of_residual.dtype.element_ty)
        tl.store(of_residual + row * hidden_size + column, rounded, mask=inside)
        if of_update is not None:
            if update_mask is None:
                g = rounded  # which takes less of the shared memory that a gather goes through
            if written_index is not None:
                g = tl.gather(g, load_shared(written_index, kept, kept < written).to(tl.int32), 0)
            if of_mask is not None:
                mask_sum += g * load_once(update + row * written, kept, kept < written).to(tl.float32)
            if update_mask is not None:
                g *= load_shared(update_mask, kept, kept < written).to(tl.float32)
            tl.store(of_update + row * written + kept, g.to(of_update.dtype.element_ty), mask=kept < written)
    program = tl.program_id(0).to(tl.int64)
    if of_weight is not None:
        tl.store(of_weight + program * hidden_size + column, weight_sum, mask=inside)
    if of_mask is not None:
        tl.store(of_mask + program * written + kept, mask_sum, mask=kept < written)


@triton.jit
def load_once(pointer, column, inside):
    """What one row alone needs."""
    return tl.load(pointer + column, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def load_shared(pointer, column, inside):
    """What every row needs."""
    return tl.load(pointer + column, mask=inside, other=0, eviction_policy="evict_last")


@triton.jit
def spread(kept, position, inside):
    """From kept features to all, in float32: 0 where one is gone."""
    stays = inside & (position >= 0)
    return tl.where(stays, tl.gather(kept, tl.where(stays, position, 0), 0).to(tl.float32), 0.0)
