"""Proximal group lasso on LoRA: w <- w * max(0, 1 - eta * beta_t * rho / ||w||) for pruned groups (ATP, eq. 8-9).

A group's weights are the columns of lora_A on the inputs it owns and the rows of lora_B on the outputs it owns. rho
is the group kind's share of all parameters that the decision prunes, so a kind that is pruned harder shrinks faster.
"""

from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from atp.processes import summed
from atp.structure.sharding import is_sharded, own_values, part, replicas_of, scale, shape_of
from atp.structure.space import Axis, Space


@torch.no_grad()
def proximal_step(
    space: Space,
    modules: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    rho: Mapping[str, float],
    learning_rate: float,
    beta: float,
) -> None:
    """Shrink the LoRA weights of every pruned group in place.

    Args:
        modules: live layers by path; those without LoRA are passed over.
        masks: the hard decision, `(size,)` per set, where layers compute.
        rho: `pruned_share` of that decision.
        learning_rate: eta of this optimizer step.
        beta: beta_t.
    """
    strength = {kind: learning_rate * beta * share for kind, share in rho.items()}
    if not any(strength.values()):
        return
    kind_of = {s.name: s.kind for s in space.sets}
    owned = list(_owned(space, modules))
    squares = [_squares(parameter, dim, axis, len(masks[axis.set])) for parameter, dim, axis in owned]
    if any(is_sharded(parameter) for parameter, _, _ in owned):
        squares = list(summed(torch.cat(squares)).split([len(found) for found in squares]))
    for (parameter, dim, axis), found in zip(owned, squares, strict=True):
        factor = (1.0 - strength[kind_of[axis.set]] / found.sqrt().clamp_min(1e-12)).clamp_min(0.0)
        factor = torch.where(masks[axis.set].to(factor.device) > 0, torch.ones_like(factor), factor)
        scale(parameter, factor[axis.owner_on(factor.device)].unsqueeze(1 - dim).expand(shape_of(parameter)))


@torch.no_grad()
def group_norms(
    space: Space, modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Mean norm of a group's LoRA weights in one layer, by kind, of `kept` and of `pruned` groups, where there are any.

    Args:
        modules, masks: as `proximal_step` takes them; parameters must be whole.
    """
    kind_of = {s.name: s.kind for s in space.sets}
    norms: dict[tuple[str, str], list[Tensor]] = {}
    for parameter, dim, axis in _owned(space, modules):
        found = _squares(parameter, dim, axis, len(masks[axis.set])).sqrt()
        kept = masks[axis.set].to(found.device) > 0
        for which, of in (("kept", kept), ("pruned", ~kept)):
            norms.setdefault((kind_of[axis.set], which), []).append(torch.stack([(found * of).sum(), of.sum()]))
    means: dict[str, dict[str, float]] = {}
    for (kind, which), parts in norms.items():
        total, groups = torch.stack(parts).sum(0).tolist()
        if groups:
            means.setdefault(kind, {})[which] = total / groups
    return means


def _owned(space: Space, modules: Mapping[str, nn.Module]) -> Iterator[tuple[Tensor, int, Axis]]:
    """LoRA parameters, the dimension along which their features belong to groups, and to which."""
    for linear in space.linears:
        layer = modules[linear.path]
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            if linear.cols is not None:
                yield layer.lora_A[adapter].weight, 1, linear.cols
            if linear.rows is not None:
                yield layer.lora_B[adapter].weight, 0, linear.rows


def pruned_share(space: Space, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """rho per kind: the kind's pruned groups, weighted by parameters, over those of all kinds; sums to 1 or is 0."""
    full = torch.tensor([float(s.size) for s in space.sets])
    pruned = (full - space.kept_counts(masks)) * space.group_parameters
    total = pruned.sum().item()
    shares = dict.fromkeys(space.kinds, 0.0)
    for s, value in zip(space.sets, pruned.tolist(), strict=True):
        shares[s.kind] += value / total if total else 0.0
    return shares


def _squares(parameter: Tensor, dim: int, axis: Axis, groups: int) -> Tensor:
    """Sum of squares of each group's weights, `(groups,)`: this process's summand, where it holds a part of them."""
    own = own_values(parameter).float().square()
    owner, found = axis.owner_on(own.device), torch.zeros(groups, device=own.device)
    if is_sharded(parameter):
        owner = part(parameter, owner.unsqueeze(1 - dim).expand(shape_of(parameter))).flatten()[: own.numel()]
        return found.index_add_(0, owner, own.flatten()) / replicas_of(parameter)
    return found.index_add_(0, owner, own.sum(1 - dim))
