"""The budget loss (ATP, arXiv 2412.14426; DISP-LLM, arXiv 2410.11988): R = log(max(p, t) / min(p, t))."""

from collections.abc import Mapping

import torch
from torch import Tensor

from atp.structure.space import Space


def budget_loss(masks: Mapping[str, Tensor], space: Space, sparsity: float) -> Tensor:
    """R for kept share p of `masks` (straight-through) against t = 1 - sparsity; a float32 scalar on the CPU."""
    share = space.kept_parameters(space.kept_counts(masks)) / space.prunable_parameters
    return (torch.log(share.clamp_min(1e-6)) - torch.log(torch.tensor(1.0 - sparsity))).abs().float()
