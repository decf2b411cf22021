"""What `deci` needs that other families do not have: separate projections, and something in every half of a block.

An attention or MLP that has lost everything may be absent or have size 0. llama.cpp leaves out an attention of 0 heads,
but not in the first block, from which it takes the size of a head. A block of 0 channels loses its attention too. There
one head or channel of zeros stands in; so it does where a bias is left. A block that has lost both is not written.
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


def without_lost_parts(
    entries: Entries, blocks: list[Sizes], head_dim: int, hidden_size: int
) -> tuple[Entries, list[Sizes]]:
    """Blocks that lost both halves left out, the others numbered anew; stand-ins where something must be."""
    written = {name: entry for name, entry in entries.items() if not place(name)}
    left: list[Sizes] = []
    for block, size in enumerate(blocks):
        own = {name.split(".", 2)[2]: e for name, e in entries.items() if (p := place(name)) and p.block == block}
        bias = {part for part in ("attn_output", "ffn_down") if f"{part}.bias" in own}
        if not (size.heads or size.channels or bias):
            continue
        heads, kv_heads, channels = size.heads, size.kv_heads, size.channels
        if not heads and ("attn_output" in bias or not left):
            heads, kv_heads = 1, 1
            own |= _zeros(dict.fromkeys(("attn_q", "attn_k", "attn_v"), head_dim), hidden_size, "attn_output")
        if not channels:
            channels = 1
            own |= _zeros({"ffn_gate": 1, "ffn_up": 1}, hidden_size, "ffn_down")
        ones = _constant((hidden_size,), 1.0)
        own = {"attn_norm.weight": ones, "ffn_norm.weight": ones} | own
        written |= {f"blk.{len(left)}.{part}": e for part, e in own.items() if heads or not part.startswith("attn_")}
        left.append(Sizes(heads, kv_heads, channels))
    return written, left


def _zeros(readers: dict[str, int], hidden_size: int, writer: str) -> Entries:
    """Readers and a writer that write nothing."""
    zeros = {f"{part}.weight": _constant((rows, hidden_size), 0.0) for part, rows in readers.items()}
    return zeros | {f"{writer}.weight": _constant((hidden_size, next(iter(readers.values()))), 0.0)}


def _constant(shape: tuple[int, ...], value: float) -> Entry:
    return Entry(shape, None, lambda _: torch.full(shape, value))
