"""What `deci` needs that other families do not have: separate projections, and something in every half of a block.

llama.cpp leaves out an attention of 0 heads, but not in the first block, from which it takes the size of a head, and
which an export never loses. A block of 0 channels would lose its attention too, so that one channel of zeros stands in.
"""

from functools import partial

import torch

from atp.export.gguf.tensors import Entries, Entry, Sizes, place


def unpacked(entries: Entries, blocks: list[Sizes], head_dim: int) -> Entries:
    """Phi-3's packed projections cut into queries, keys and values, and into gate and up."""
    cut: Entries = {}
    for name, entry in entries.items():
        found = place(name)
        if found and found.part == "attn_qkv":
            own = blocks[found.block]
            rows = [own.heads * head_dim, own.kv_heads * head_dim, own.kv_heads * head_dim]
            parts = ["attn_q", "attn_k", "attn_v"]
        elif found and found.part == "ffn_up" and entry.shape[0] == 2 * blocks[found.block].channels:
            parts, rows = ["ffn_gate", "ffn_up"], [entry.shape[0] // 2] * 2
        else:
            cut[name] = entry
            continue
        for i, (part, count) in enumerate(zip(parts, rows, strict=True)):
            change = partial(torch.narrow, dim=0, start=sum(rows[:i]), length=count)
            cut[f"blk.{found.block}.{part}.{found.kind}"] = entry.then(change, (count, *entry.shape[1:]))
    return cut


def without_lost_parts(entries: Entries, blocks: list[Sizes], hidden_size: int) -> tuple[Entries, list[Sizes]]:
    """Norms of attentions that are gone left out; a channel of zeros where an MLP is."""
    written, left = dict(entries), []
    for block, size in enumerate(blocks):
        channels = size.channels or 1
        if not size.heads:
            written.pop(f"blk.{block}.attn_norm.weight")
        if not size.channels:
            written |= {f"blk.{block}.{part}.weight": _zeros(1, hidden_size) for part in ("ffn_gate", "ffn_up")}
            written[f"blk.{block}.ffn_down.weight"] = _zeros(hidden_size, 1)
        left.append(Sizes(size.heads, size.kv_heads, channels))
    return written, left


def _zeros(rows: int, cols: int) -> Entry:
    return Entry((rows, cols), None, lambda _: torch.zeros(rows, cols))
