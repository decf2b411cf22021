"""Which features of a dimension stay, in both directions: from kept to all, and from all to kept.

Along the last dimension PyTorch's `gather` and `scatter_` do what `index_select` and `index_copy` do, with the index
expanded over rows, in less time: on two CPU cores, 380 of 576 features of 2,048 tokens, 0.29 and 0.26 ms, not 0.78 and
0.81, and a backward pass that is the other of the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atp.transfers import together


@dataclass(frozen=True, eq=False)
class Selection:
    """Kept features, in ascending order.

    Attributes:
        index: their places among all, int64, `(kept,)`.
        position: for each of all features its place among the kept ones, or -1 where it is gone: int32, `(features,)`.
    """

    index: Tensor
    position: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> "Selection":
        """From a bool per feature."""
        position = torch.where(keep, keep.cumsum(0) - 1, -1)
        return cls(torch.nonzero(keep).flatten(), position.to(torch.int32))

    @staticmethod
    def moved(selections: Sequence["Selection"], device: torch.device) -> list["Selection"]:
        """The same on another device, all of them at once."""
        if not selections:
            return []
        indices = together([selection.index for selection in selections], device)
        positions = together([selection.position for selection in selections], device)
        return [Selection(index, position) for index, position in zip(indices, positions, strict=True)]


def gather_features(x: Tensor, index: Tensor) -> Tensor:
    """`x[..., index]`, `(..., kept)`; no feature may be in `index` twice."""
    if torch.compiler.is_compiling():
        return x.gather(-1, index.expand(*x.shape[:-1], -1))
    gathered: Tensor = _Gather.apply(x, index)
    return gathered


def scatter_features(y: Tensor, index: Tensor, features: int) -> Tensor:
    """`(..., features)`: what `y`, `(..., kept)`, holds at `index`, zeros elsewhere."""
    return y.new_zeros(*y.shape[:-1], features).scatter_(-1, index.expand_as(y), y)


class _Gather(torch.autograd.Function):
    """PyTorch's own would add gradients up, by an atomic addition each on GPUs, for places that could be one twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.features = x.shape[-1]
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter_features(gradients[0], index, ctx.features), None
