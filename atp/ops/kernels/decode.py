"""Gather, linear layer and scatter for a few tokens. Definition: `atp.ops.decode.gather_linear_scatter_eager`.

A program owns a slice of the result's features, for all tokens. It reads the whole rows of W that belong there, and so
writes every feature once: zero where the feature is gone. The product is W x^T, since a tile for tensor cores has many
rows and may have few columns. Sums are in float32. Rows of W whose length is no multiple of 16 are read one number
at a time: right, but slow.
"""
# mypy: allow-untyped-defs
# (a kernel's arguments have no types of Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128
"""At least, where features suffice: an H100 has 132 multiprocessors."""


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, read: Tensor | None, position: Tensor | None) -> Tensor:
    """x[:, read] W^T + b for `(tokens, features)`, feature j from row `position[j]` of W, or zero where that is -1."""
    tokens = len(x)
    outputs, inputs = weight.shape
    outputs = outputs if position is None else len(position)
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    block_outputs, block_tokens, block_inputs, options = blocks(outputs, tokens, x.element_size())
    with torch.cuda.device_of(x):
        decode_kernel[(triton.cdiv(outputs, block_outputs),)](
            x,
            weight,
            None if bias is None else bias.contiguous(),
            read,
            position,
            y,
            tokens,
            outputs,
            inputs,
            *x.stride(),
            *weight.stride(),
            block_outputs,
            block_tokens,
            block_inputs,
            **options,
        )
    return y


def blocks(outputs: int, tokens: int, element_size: int) -> tuple[int, int, int, dict[str, int]]:
    """A program's outputs, tokens and inputs, and options of its launch.

    Few outputs keep all multiprocessors reading W; many inputs and stages keep enough of it on its way to each.
    """
    block_outputs = next((block for block in (64, 32) if triton.cdiv(outputs, block) >= PROGRAMS), 16)
    block_tokens = max(16, triton.next_power_of_2(tokens))
    wide = block_outputs < 64 and block_tokens < 64  # or else a gathered x leaves no registers
    block_inputs = (256 if wide else 128) * 2 // element_size
    warps = 8 if block_outputs * block_tokens == 4096 else 4
    return block_outputs, block_tokens, block_inputs, {"num_warps": warps, "num_stages": 4}


@triton.jit
def decode_kernel(
    x,
    weight,
    bias,
    read,
    position,
    y,
    tokens,
    outputs,
    inputs,
    x_stride,
    x_feature_stride,
    weight_stride,
    weight_input_stride,
    block_outputs: tl.constexpr,
    block_tokens: tl.constexpr,
    block_inputs: tl.constexpr,
):
    """`bias`, `read` and `position` may be None."""
    output = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    token = tl.arange(0, block_tokens)
    row = output
    owned = output < outputs
    if position is not None:
        row = tl.load(position + output, mask=owned, other=-1)
        owned = row >= 0
    weight_row = weight + row.to(tl.int64)[:, None] * weight_stride
    x_row = x + token[:, None].to(tl.int64) * x_stride
    total = tl.zeros((block_outputs, block_tokens), tl.float32)
    for start in range(0, inputs, block_inputs):
        k = start + tl.arange(0, block_inputs)
        exists = k < inputs
        feature = k
        if read is not None:
            feature = tl.load(read + k, mask=exists, other=0)
        w = tl.load(weight_row + k[None, :] * weight_input_stride, mask=owned[:, None] & exists[None, :], other=0)
        v = tl.load(
            x_row + feature[None, :] * x_feature_stride, mask=(token < tokens)[:, None] & exists[None, :], other=0
        )
        total = tl.dot(w, tl.trans(v), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + row, mask=owned, other=0).to(tl.float32)[:, None]
    total = tl.where(owned[:, None], total, 0)
    place = y + token[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(place, tl.trans(total), mask=(token < tokens)[:, None] & (output < outputs)[None, :])
