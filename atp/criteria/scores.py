"""Criteria: one score per group, higher is more worth keeping.

activation  sum over a group's weights of |W_ij| * ||x_j||  (Wanda, arXiv 2306.11695, summed over the group)
magnitude   the same with ||x_j|| = 1
taylor      |dL/dm| of the group's mask at m = 1, averaged over batches (LLM-Pruner, arXiv 2305.11627, first order)
random      uniform

Weights are read where the masked model applies the mask: the columns of the layer that consumes the group, or the
rows of the layer that writes it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atp.structure.live import base_layer, dequantised_weight
from atp.structure.space import Space

Modules = Mapping[str, nn.Module]
"""Live linear layers by path."""


def magnitude(space: Space, modules: Modules) -> dict[str, Tensor]:
    """Sum of absolute weights of each group."""
    ones = {linear.path: torch.ones(linear.in_features) for linear in space.linears}
    return _weighted(space, modules, ones)


def activation(
    space: Space, modules: Modules, forward: Callable[[Any], object], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Activation-weighted magnitude; `forward(batch)` runs the model once."""
    squares = {linear.path: torch.zeros(linear.in_features) for linear in space.linears}

    def watch(path: str) -> Callable:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            squares[path] += x.square().sum(dim=0).cpu()

        return hook

    hooks = [modules[linear.path].register_forward_pre_hook(watch(linear.path)) for linear in space.linears]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return _weighted(space, modules, {path: square.sqrt() for path, square in squares.items()})


def taylor(
    space: Space, masks: Mapping[str, Tensor], loss: Callable[[Any], Tensor], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """First-order Taylor; `masks` are the model's live mask leaves, all ones, `loss(batch)` a scalar under them."""
    names = [s.name for s in space.sets]
    leaves = [masks[name].requires_grad_(True) for name in names]
    total = [torch.zeros(len(leaf)) for leaf in leaves]
    for batch in batches:
        for running, gradient in zip(total, torch.autograd.grad(loss(batch), leaves), strict=True):
            running += gradient.abs().cpu()
    for leaf in leaves:
        leaf.requires_grad_(False)
    return dict(zip(names, total, strict=True))


def random(space: Space, seed: int) -> dict[str, Tensor]:
    """Uniform scores from a private stream."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.size, generator=generator) for s in space.sets}


def _weighted(space: Space, modules: Modules, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_input: dict[str, Tensor] = {}
    by_output: dict[str, Tensor] = {}
    sizes = {s.name: s.size for s in space.sets}
    for linear in space.linears:
        if not (linear.mask_cols or linear.mask_rows):
            continue
        weight = _weight(modules[linear.path]).abs() * norms[linear.path]
        for axis, wanted, scores, dim in (
            (linear.cols, linear.mask_cols, by_input, 0),
            (linear.rows, linear.mask_rows, by_output, 1),
        ):
            if axis is not None and wanted:
                scores.setdefault(axis.set, torch.zeros(sizes[axis.set])).index_add_(0, axis.owner, weight.sum(dim))
    return by_output | by_input


def _weight(module: nn.Module) -> Tensor:
    return dequantised_weight(base_layer(module)).float().cpu()
