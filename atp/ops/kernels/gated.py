"""Gated product and its gradients, one pass over the data each. Definition: `atp.ops.gated.gated_eager`.

A program owns a strip of features, and of it one tile of rows; or several, one after the other, where the mask needs a
gradient, which is a sum over rows: it leaves a partial one. All arithmetic is in float32.
"""
# mypy: allow-untyped-defs
# (a kernel's arguments have no types of Python's)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_FORWARD, ROWS_BACKWARD = 4, 2
"""Of a tile: what leaves registers (54 and 70 to 122 of an H100's 255) for several programs at once."""

TILES = 16
"""In a program that sums over rows: there is one partial sum for 32 of them."""

_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)


def forward(gate: Tensor, up: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    """act(gate) * up * mask."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = as_rows(gate), as_rows(up)
    rows, features = gate.shape
    block, warps = strip(features)
    grid = (triton.cdiv(rows, ROWS_FORWARD) * triton.cdiv(features, block),)
    with torch.cuda.device_of(gate):
        forward_kernel[grid](
            gate,
            up,
            None if mask is None else mask.contiguous(),
            y,
            rows,
            features,
            gate.stride(0),
            up.stride(0),
            activation,
            ROWS_FORWARD,
            block,
            num_warps=warps,
        )
    return y


def backward(
    of_y: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None, activation: str, needs_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and, where it is needed, mask: otherwise that one is empty."""
    of_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    of_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    of_y, gate, up = as_rows(of_y), as_rows(gate), as_rows(up)
    rows, features = gate.shape
    tiles = TILES if needs_mask else 1
    chunks = triton.cdiv(rows, ROWS_BACKWARD * tiles)
    partials = torch.empty(chunks, features, dtype=torch.float32, device=gate.device) if needs_mask else None
    block, warps = strip(features)
    with torch.cuda.device_of(gate):
        backward_kernel[(chunks * triton.cdiv(features, block),)](
            of_y,
            gate,
            up,
            None if mask is None else mask.contiguous(),
            of_gate,
            of_up,
            partials,
            rows,
            features,
            of_y.stride(0),
            gate.stride(0),
            up.stride(0),
            activation,
            tiles,
            ROWS_BACKWARD,
            block,
            num_warps=warps,
        )
    if mask is None or partials is None:
        return of_gate, of_up, gate.new_empty(0)
    return of_gate, of_up, partials.sum(0).to(mask.dtype)


def as_rows(x: Tensor) -> Tensor:
    """`(rows, features)` with adjacent features, in place where strides allow."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def strip(features: int) -> tuple[int, int]:
    """Features of a program, and its warps: 16 bytes of 16-bit numbers for each thread, and few threads in vain."""
    for block in (1024, 512):
        if triton.cdiv(features, block) * block <= 1.125 * features:
            return block, block // 256
    return 256, 1


@triton.jit
def forward_kernel(
    gate,
    up,
    mask,
    y,
    rows,
    features,
    gate_stride,
    up_stride,
    activation: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """`mask` may be None."""
    strips = tl.cdiv(features, block)
    column = tl.program_id(0) % strips * block + tl.arange(0, block)
    row = (tl.program_id(0) // strips).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    exists = column < features
    inside = (row < rows) & exists
    g = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    act, _ = activated(g, activation)
    product = act * u
    if mask is not None:
        product *= tl.load(mask + column, mask=exists).to(tl.float32)
    tl.store(y + row * features + column, product, mask=inside)


@triton.jit
def backward_kernel(
    of_y,
    gate,
    up,
    mask,
    of_gate,
    of_up,
    partials,
    rows,
    features,
    of_y_stride,
    gate_stride,
    up_stride,
    activation: tl.constexpr,
    tiles: tl.constexpr,
    block_rows: tl.constexpr,
    block: tl.constexpr,
):
    """`mask` and `partials`, `(programs along rows, features)`, may be None."""
    strips = tl.cdiv(features, block)
    column = tl.program_id(0) % strips * block + tl.arange(0, block)
    chunk = (tl.program_id(0) // strips).to(tl.int64)
    exists = column < features
    m = 1.0 if mask is None else tl.load(mask + column, mask=exists).to(tl.float32)
    of_mask = tl.zeros((block,), tl.float32)
    for tile in range(tiles):
        row = (chunk * tiles + tile) * block_rows + tl.arange(0, block_rows)[:, None]
        inside = (row < rows) & exists
        d = tl.load(of_y + row * of_y_stride + column, mask=inside, other=0).to(tl.float32)
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0).to(tl.float32)
        act, slope = activated(g, activation)
        tl.store(of_gate + row * features + column, d * m * u * slope, mask=inside)
        tl.store(of_up + row * features + column, d * m * act, mask=inside)
        of_mask += tl.sum(d * u * act, 0)
    if partials is not None:
        tl.store(partials + chunk * features + column, of_mask, mask=exists)


@triton.jit
def activated(x, activation: tl.constexpr):
    """act(x) and act'(x). Either is x sigmoid(z(x)): GELU's (1 + tanh(z / 2)) / 2 is sigmoid(z)."""
    if activation == "silu":
        z = x
        z_slope = 1.0
    else:
        z = _SCALE * (x + _CUBIC * x * x * x)
        z_slope = _SCALE * (1 + 3 * _CUBIC * x * x)
    s = tl.sigmoid(z)
    return x * s, s + x * s * (1 - s) * z_slope
