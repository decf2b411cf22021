"""A few numbers of a base model, by which another one is known."""

from collections.abc import Sequence

import torch
from torch import nn

from atp.structure.discovery import Structure
from atp.structure.live import base_layer, causal_lm, is_quantised
from atp.structure.sharding import whole

_NUMBERS = 64
"""Of a layer."""

_SAME = 5e-3
"""Relative distance up to which two samples are of one model, in two dtypes: bfloat16 rounds by 4e-3 at most."""


def base_sample(model: nn.Module, structure: Structure) -> list[float] | None:
    """Numbers of what the first and the last block's attention reads with, evenly spread; None where quantised.

    Collective, where weights are held in parts.
    """
    lm, blocks = causal_lm(model), structure.blocks
    layers = [base_layer(lm.get_submodule(block.attention.readers[0].path)) for block in (blocks[0], blocks[-1])]
    if any(is_quantised(layer) for layer in layers):
        return None
    found: list[float] = []
    for layer in layers:
        weight = whole(layer.weight).flatten()
        places = torch.arange(_NUMBERS, device=weight.device) * (len(weight) - 1) // (_NUMBERS - 1)
        found += weight[places].float().tolist()
    return found


def is_another(sample: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether two samples are of different models; not where one is unknown."""
    if not sample or not other:
        return False
    if len(sample) != len(other):
        return True
    ours, theirs = torch.tensor(sample, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return bool((ours - theirs).norm() > _SAME * ours.norm())
