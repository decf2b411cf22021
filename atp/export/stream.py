"""Cutting the residual stream: what becomes of each tensor that holds a dimension of it (see `structure.stream`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.structure.live import base_layer
from atp.structure.sharding import gathered, whole
from atp.structure.space import HIDDEN, Space

_AT_ONCE = 1024
"""Rows of an embedding that are scaled together."""


@dataclass(frozen=True, eq=False)
class StreamCut:
    """Of one module.

    Attributes:
        kept: dimensions that stay, where cutting is not left to the layer's own axes.
        weight, rest: factors of the weight, and of what is beside it.
        offset: what a norm adds to its weight before it multiplies (Gemma: 1).
    """

    kept: Tensor
    weight: float = 1.0
    rest: float = 1.0
    offset: float = 0.0

    def of(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors cut along their last dimension, and scaled, in float32, a part at a time."""
        cut = {name: t.detach().index_select(-1, self.kept.to(t.device)) for name, t in own.items()}
        for name, tensor in cut.items():
            factor = self.weight if name == "weight" else self.rest
            for part in tensor.split(_AT_ONCE) if factor != 1.0 else ():
                part.copy_((part.float() + self.offset) * factor - self.offset)
        return cut


def stream_cuts(lm: PreTrainedModel, space: Space, masks: Mapping[str, Tensor]) -> dict[str, StreamCut]:
    """What becomes of what adds to the stream and reads it, by path; nothing where the space does not cut it."""
    if space.stream is None:
        return {}
    stream, structure = space.structure.stream, space.structure
    kept = torch.nonzero(masks[HIDDEN].detach().cpu()).flatten()
    c = math.sqrt(len(kept) / structure.hidden_size)
    opening = 1.0 if _grows_with_width(lm.get_submodule(stream.embedding), structure.hidden_size) else c
    cuts = {stream.embedding: StreamCut(kept, opening), stream.head: StreamCut(kept, opening)}
    cuts[stream.last_norm] = StreamCut(kept, 1.0 / (c * opening), offset=_offset(lm.get_submodule(stream.last_norm)))
    for path in stream.norms_before:
        cuts[path] = StreamCut(kept, 1.0 / c, offset=_offset(lm.get_submodule(path)))
    for path in stream.norms_writing:
        cuts[path] = StreamCut(kept)
    for block in structure.blocks:
        for half in (block.attention, block.mlp):
            cuts[half.writer.path] = StreamCut(kept, c, c)
            if half.path in stream.bare_halves:
                cuts |= {reader.path: StreamCut(kept, 1.0 / c) for reader in half.readers}
    return cuts


def _grows_with_width(embedding: nn.Module, hidden_size: int) -> bool:
    """Whether the embedding multiplies by the root of its own width, as Gemma's do."""
    if isinstance(embedding, AuxiliaryTrainingWrapper):
        embedding = embedding.original_module
    scale = getattr(base_layer(embedding), "scalar_embed_scale", 1.0)
    return math.isclose(scale, math.sqrt(hidden_size), rel_tol=1e-6)


def _offset(norm: Any) -> float:
    """What an RMS norm adds to its weight before it multiplies: told by what it makes of ones."""
    with torch.no_grad(), gathered(norm):
        weight = whole(norm.weight).float()
        return float((norm(torch.ones_like(weight)).float() - weight).mean().round())
