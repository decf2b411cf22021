"""Rows and columns of a matrix by index, in tiles: kept ones, or back to all, with zeros where an index is -1.

Definition: `atp.ops.compaction.compact_weight_eager`, and its gradient.
"""
# mypy: allow-untyped-defs
# (a kernel's arguments have no types of Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


def gather(source: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor | None = None) -> Tensor:
    """source[rows][:, cols], 0 where an index is -1; None stands for all. Indices are int32 or int64."""
    n_rows, n_cols = (n if index is None else len(index) for index, n in zip((rows, cols), source.shape, strict=True))
    if out is None:
        out = torch.empty(n_rows, n_cols, dtype=source.dtype, device=source.device)
    block_rows, block_cols = tile(n_cols)
    grid = (triton.cdiv(n_rows, block_rows) * triton.cdiv(n_cols, block_cols),)
    with torch.cuda.device_of(source):
        gather_kernel[grid](
            source,
            rows,
            cols,
            out,
            n_rows,
            n_cols,
            *source.stride(),
            *out.stride(),
            block_rows,
            block_cols,
            num_warps=WARPS,
        )
    return out


def tile(n_cols: int) -> tuple[int, int]:
    """Rows and columns of a program: 16 elements for each of its threads, and no more columns than needed."""
    block_cols = min(512, max(16, triton.next_power_of_2(n_cols)))
    return 4096 // block_cols, block_cols


@triton.jit
def gather_kernel(
    source,
    rows,
    cols,
    out,
    n_rows,
    n_cols,
    source_row_stride,
    source_col_stride,
    out_row_stride,
    out_col_stride,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
):
    """`rows` and `cols` may be None."""
    strips = tl.cdiv(n_cols, block_cols)
    row = (tl.program_id(0) // strips).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    col = (tl.program_id(0) % strips).to(tl.int64) * block_cols + tl.arange(0, block_cols)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    known = inside
    source_row = row
    if rows is not None:
        source_row = tl.load(rows + row, mask=row < n_rows, other=-1).to(tl.int64)
        known &= (source_row >= 0)[:, None]
    source_col = col
    if cols is not None:
        source_col = tl.load(cols + col, mask=col < n_cols, other=-1).to(tl.int64)
        known &= (source_col >= 0)[None, :]
    place = source_row[:, None] * source_row_stride + source_col[None, :] * source_col_stride
    value = tl.load(source + place, mask=known, other=0)
    tl.store(out + row[:, None] * out_row_stride + col[None, :] * out_col_stride, value, mask=inside)
