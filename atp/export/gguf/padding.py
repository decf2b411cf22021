"""Heads of zeros in place of pruned ones, where llama.cpp's architecture has as many heads as fill the hidden size.

Such a head reads nothing and nothing reads it, so that the model computes the same; its bytes come back. A norm over
all heads (OLMo 2) divides by the root of sum(x^2) / H, and gets H features back in place of H': what it reads is
divided by c = sqrt(H'/H) and its weight multiplied by it, which leaves the root as it was.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from atp.export.gguf.tensors import Change, Entries, Sizes, place


def padded(entries: Entries, blocks: list[Sizes], head_dim: int, hidden_size: int) -> tuple[Entries, list[Sizes]]:
    """Every block with `hidden_size / head_dim` heads."""
    full = [_full(size, hidden_size // head_dim) for size in blocks]
    entries = dict(entries)
    for name, entry in entries.items():
        found = place(name)
        if found is None or blocks[found.block] == full[found.block]:
            continue
        own, goal = blocks[found.block], full[found.block]
        of_keys = found.part.startswith(("attn_k", "attn_v"))
        before, after = ((s.kv_heads if of_keys else s.heads) * head_dim for s in (own, goal))
        if found.part == "attn_output" and found.kind == "weight":
            entries[name] = entry.then(partial(pad, pad=(0, after - before)), (entry.shape[0], after))
        elif found.part in ("attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm"):
            scale = _scale(entries, found.block, found.part, before / after)
            entries[name] = entry.then(_more_rows(after - before, scale), (after, *entry.shape[1:]))
    return entries, full


def _full(size: Sizes, heads: int) -> Sizes:
    return Sizes(heads, heads * size.kv_heads // size.heads, size.channels)


def _scale(entries: Entries, block: int, part: str, share: float) -> float:
    """1/c before a norm over all heads, c in its weight, else 1."""
    if part.endswith("_norm"):
        return math.sqrt(share)
    return 1.0 / math.sqrt(share) if f"blk.{block}.{part}_norm.weight" in entries else 1.0


def _more_rows(count: int, scale: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        return torch.cat([tensor * scale, tensor.new_zeros(count, *tensor.shape[1:])])

    return change
