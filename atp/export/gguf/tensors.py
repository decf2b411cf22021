"""Tensors as they lie in a GGUF file: GGUF's names, and what is done to transformers' values on the way."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import gguf
from torch import Tensor

from atp.errors import UnsupportedModelError
from atp.export.gguf.families import Family

Change = Callable[[Tensor], Tensor]
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: `change` of the float32 tensor `source`, or of an empty one where that is None."""

    shape: tuple[int, ...]
    source: str | None
    change: Change

    def then(self, change: Change, shape: tuple[int, ...] | None = None) -> "Entry":
        """The same, changed once more."""
        before = self.change
        return replace(self, shape=shape or self.shape, change=lambda tensor: change(before(tensor)))


Entries = dict[str, Entry]
"""By GGUF's name."""


@dataclass(frozen=True)
class Sizes:
    """What one block has."""

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Place:
    """A tensor's block, its part such as `attn_q`, and whether it is a weight or a bias."""

    block: int
    part: str
    kind: str


def place(name: str) -> Place | None:
    """Where in a block a tensor is, or None where it is in none."""
    found = _BLOCK.fullmatch(name)
    return Place(int(found[1]), found[2], found[3]) if found else None


def named(family: Family, blocks: int, shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """Every tensor of a state dict that has elements.

    Raises:
        UnsupportedModelError: naming a tensor for which llama.cpp's architecture has no place.
    """
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(architecture, blocks)
    entries = {}
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"{source}: llama.cpp's {family.architecture} has no such tensor: keep the Hugging Face folder"
            )
        if math.prod(shape):
            entries[name] = Entry(shape, source, lambda tensor: tensor)
    return entries


def sizes(entries: Entries, block: int, head_dim: int) -> Sizes:
    """A block's, by the shapes of its tensors; 0 where there are none."""

    def size(part: str, axis: int) -> int:
        entry = entries.get(f"blk.{block}.{part}.weight")
        return entry.shape[axis] if entry else 0

    heads = size("attn_output", 1) // head_dim
    packed = size("attn_qkv", 0) // head_dim
    kv_heads = (packed - heads) // 2 if packed else size("attn_k", 0) // head_dim
    return Sizes(heads, kv_heads, size("ffn_down", 1))


def change_each(entries: Entries, part: str, change: Change) -> None:
    """Change weight and bias of `part` in every block, or of the whole model."""
    for name, entry in entries.items():
        found = place(name)
        if (found.part if found else name.rsplit(".", 1)[0]) == part:
            entries[name] = entry.then(change)


def side_by_side(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from halves (i, i + head_dim/2), as transformers rotates them, to pairs (2i, 2i + 1)."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(tensor.shape)


def apart(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of GPT-NeoX's projection from query, key, value of each head to all queries, all keys, all values."""
    return tensor.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).reshape(tensor.shape)
