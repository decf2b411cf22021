"""Proximal group lasso on LoRA: w <- w * max(0, 1 - eta * beta_t * rho / ||w||) for pruned groups (ATP, eq. 8-9).

A group's weights are the columns of lora_A on the inputs it owns and the rows of lora_B on the outputs it owns. rho
is the group kind's share of all parameters that the decision prunes, so a kind that is pruned harder shrinks faster.
"""

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from atp.structure.space import Axis, Space


@torch.no_grad()
def proximal_step(
    space: Space, modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor], learning_rate: float, beta: float
) -> None:
    """Shrink the LoRA weights of every pruned group in place.

    Args:
        modules: live layers by path; those without LoRA are passed over.
        masks: the hard decision, `(size,)` per set.
        learning_rate: eta of this optimizer step.
        beta: beta_t.
    """
    if beta == 0 or learning_rate == 0:
        return
    strength = {kind: learning_rate * beta * rho for kind, rho in pruned_share(space, masks).items()}
    kind_of = {s.name: s.kind for s in space.sets}
    for linear in space.linears:
        layer = modules[linear.path]
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            if linear.cols is not None:
                weight = layer.lora_A[adapter].weight.data.T
                _shrink(weight, linear.cols, masks, strength[kind_of[linear.cols.set]])
            if linear.rows is not None:
                weight = layer.lora_B[adapter].weight.data
                _shrink(weight, linear.rows, masks, strength[kind_of[linear.rows.set]])


def pruned_share(space: Space, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """rho per kind: the kind's pruned groups, weighted by parameters, over those of all kinds; sums to 1 or is 0."""
    full = torch.tensor([float(s.size) for s in space.sets])
    pruned = (full - space.kept_counts(masks)) * space.group_parameters
    total = pruned.sum().item()
    shares = dict.fromkeys(space.kinds, 0.0)
    for s, value in zip(space.sets, pruned.tolist(), strict=True):
        shares[s.kind] += value / total if total else 0.0
    return shares


def _shrink(weight: Tensor, axis: Axis, masks: Mapping[str, Tensor], strength: float) -> None:
    """Shrink rows of `weight` `(features, rank)` that belong to pruned groups; a view of the parameter."""
    mask = masks[axis.set]
    owner = axis.owner.to(weight.device)
    squares = torch.zeros(len(mask), device=weight.device)
    squares.index_add_(0, owner, weight.float().square().sum(dim=1))
    factor = (1.0 - strength / squares.sqrt().clamp_min(1e-12)).clamp_min(0.0)
    factor = torch.where(mask.to(weight.device) > 0, torch.ones_like(factor), factor)
    weight.mul_(factor[owner].unsqueeze(1).to(weight.dtype))
