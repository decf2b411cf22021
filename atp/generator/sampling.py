"""From logits to masks, as pure functions over `dict[str, Tensor]` keyed by group set.

Soft mask s = sigmoid((z + gumbel)/tau); hard mask 1[z + gumbel > 0] (ATP, arXiv 2412.14426; the bias b is part of z).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

EULER_GAMMA = 0.5772156649015329
"""Mean of a Gumbel(0, 1) variable."""


def add_noise(logits: Mapping[str, Tensor], scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Logits plus `scale` times Gumbel noise, centred so that fading the noise out does not shift the budget.

    Args:
        generator: a private CPU generator, so that every device and every rank draws the same.
    """
    if scale == 0:
        return dict(logits)
    noisy = {}
    for name, z in logits.items():
        uniform = torch.rand(z.shape, generator=generator).clamp_(1e-10, 1.0 - 1e-7)
        gumbel = -torch.log(-torch.log(uniform)) - EULER_GAMMA
        noisy[name] = z + scale * gumbel.to(z.device)
    return noisy


def soften(logits: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """Soft masks sigmoid(z / tau), in (0, 1)."""
    return {name: torch.sigmoid(z / temperature) for name, z in logits.items()}


def threshold(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hard masks 1[z > 0]."""
    return {name: (z.detach() > 0).float() for name, z in logits.items()}


def straight_through(hard: Mapping[str, Tensor], soft: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks with the values of `hard` and the gradients of `soft`."""
    return {name: soft[name] + (hard[name] - soft[name]).detach() for name in hard}
