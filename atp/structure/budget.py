"""The budget: scores in, the best 0/1 decision that meets an asked sparsity exactly out.

Groups are kept in the order of their scores until the parameters are spent; what is left over is filled with the best
groups that still fit; where coarse steps still leave a gap that MLP channels can fill, kinds are traded until it
closes. The kept parameters never exceed the target. Kept counts respect every set's allowed counts (rounding), and with
`uniform` every block takes the same count of heads and channels while choosing its own.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atp.errors import BudgetError
from atp.structure.space import KV, MLP, Space

TOLERANCE = 0.002
"""|achieved - asked| that counts as met: 0.2 % of the prunable parameters."""


@dataclass(frozen=True)
class _Column:
    """Sets that take the same kept count: one set, or one kind over all blocks when uniform."""

    sets: tuple[int, ...]
    counts: tuple[int, ...]
    values: Tensor  # (len(counts) - 1,), descending: the mean score of the groups that each further count adds


def project(scores: Mapping[str, Tensor], space: Space, sparsity: float) -> dict[str, Tensor]:
    """The decision on budget that keeps the highest scores.

    Args:
        scores: per group set, `(size,)`; higher is kept first, comparable across sets.
        sparsity: share of prunable parameters to remove.

    Returns:
        Masks of 0.0 and 1.0 per set, `(size,)`, float32 on the scores' device.

    Raises:
        BudgetError: where even the smallest allowed widths keep more than asked.
    """
    target = target_parameters(space, sparsity)
    ordered = [torch.sort(scores[s.name].detach(), descending=True, stable=True) for s in space.sets]
    columns = _columns(space, [o.values.double().cpu() for o in ordered])
    counts = _choose(space, columns, target)
    masks = {}
    for group_set, order, count in zip(space.sets, ordered, counts.tolist(), strict=True):
        mask = torch.zeros(group_set.size, device=order.indices.device)
        mask[order.indices[: int(count)]] = 1.0
        masks[group_set.name] = mask
    return masks


_ROUNDING = 1.0 + 1e-12
"""So that 1 - 0.8, which is a little less than 0.2, does not cost a group."""


def target_parameters(space: Space, sparsity: float) -> float:
    """Prunable parameters that may be kept.

    Raises:
        BudgetError: where the space cannot go as low.
    """
    target = (1.0 - sparsity) * space.prunable_parameters * _ROUNDING
    least = space.kept_parameters(torch.tensor([float(s.counts[0]) for s in space.sets])).item()
    if least > target:
        reach = 1.0 - least / space.prunable_parameters
        raise BudgetError(
            f"sparsity={sparsity} cannot be reached in space {space.name!r}"
            f"{' with uniform widths' if space.uniform else ''}: the smallest allowed counts remove {reach:.4f}; "
            "ask for less, lower round_to, or use another space"
        )
    return target


def budget_note(space: Space, masks: Mapping[str, Tensor], sparsity: float) -> str | None:
    """One line to say when rounding or uniform widths made the asked sparsity unreachable, else None."""
    achieved = space.sparsity(masks)
    if abs(achieved - sparsity) <= TOLERANCE:
        return None
    return (
        f"sparsity {sparsity:.4f} is not reachable exactly with these groups"
        f"{' (uniform)' if space.uniform else ''}: taking {achieved:.4f}, so that the model is not larger than asked"
    )


def _columns(space: Space, ordered: list[Tensor]) -> list[_Column]:
    ties: dict[object, list[int]] = {}
    for index, group_set in enumerate(space.sets):
        tied = space.uniform and group_set.kind in (KV, MLP)
        key = (group_set.kind, group_set.size) if tied else index
        ties.setdefault(key, []).append(index)
    columns = []
    for members in ties.values():
        counts = space.sets[members[0]].counts
        mean = torch.stack([ordered[i] for i in members]).mean(dim=0)
        edges = torch.tensor(counts)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), mean.cumsum(0)])[edges]
        columns.append(_Column(tuple(members), counts, sums.diff() / edges.diff()))
    return columns


def _choose(space: Space, columns: list[_Column], target: float) -> Tensor:
    """Kept count of every set, `(sets,)`: the longest affordable prefix of steps by value, then what still fits."""
    values = torch.cat([c.values for c in columns])
    owner = torch.cat([torch.full((len(c.values),), i) for i, c in enumerate(columns)])
    owner = owner[torch.sort(values, descending=True, stable=True).indices]

    def steps_after(prefix: int) -> list[int]:
        return torch.bincount(owner[:prefix], minlength=len(columns)).tolist()

    low, high = 0, len(owner)
    while low < high:
        middle = (low + high + 1) // 2
        if _spent(space, columns, steps_after(middle)) <= target:
            low = middle
        else:
            high = middle - 1
    everywhere = range(len(columns))
    steps = _fill(space, columns, everywhere, steps_after(low), target)
    gap = target - _spent(space, columns, steps)
    if MLP in space.kinds and gap > TOLERANCE * space.prunable_parameters:
        steps = _trade(space, columns, steps, target)
    return _kept(space, columns, steps)


def _fill(space: Space, columns: list[_Column], members: Iterable[int], steps: list[int], target: float) -> list[int]:
    """Spend what is left on `members`: best next step first; a column whose next step does not fit is closed."""
    steps = list(steps)
    queue = [(-columns[i].values[steps[i]].item(), i) for i in members if steps[i] < len(columns[i].values)]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        steps[i] += 1
        if _spent(space, columns, steps) > target:
            steps[i] -= 1
        elif steps[i] < len(columns[i].values):
            heapq.heappush(queue, (-columns[i].values[steps[i]].item(), i))
    return steps


def _trade(space: Space, columns: list[_Column], steps: list[int], target: float) -> list[int]:
    """Come closer where coarse steps leave a gap: more or fewer of a kind, nearest first, the rest refitted.

    In `width` this tries every total of KV groups with the most channels that fit, so it finds the closest total
    that is not larger wherever all steps of a kind cost the same.
    """
    best, best_spent = steps, _spent(space, columns, steps)
    for kind in (k for k in space.kinds if k != MLP):
        mine = [i for i, c in enumerate(columns) if space.sets[c.sets[0]].kind == kind]
        others = [i for i in range(len(columns)) if i not in mine]
        for trial in _nearby(columns, mine, steps):
            fitted = list(trial)
            while _spent(space, columns, fitted) > target and _drop_worst(columns, others, fitted):
                pass
            fitted = _fill(space, columns, others, fitted, target)
            spent = _spent(space, columns, fitted)
            if best_spent < spent <= target:
                best, best_spent = fitted, spent
            if target - best_spent <= TOLERANCE * space.prunable_parameters:
                return best
    return best


def _nearby(columns: list[_Column], members: list[int], steps: list[int]) -> Iterator[list[int]]:
    """`steps` with one step of `members` more, one less, two more, ...: nearest to the scores' own wish first."""
    more, less, moved = list(steps), list(steps), True
    while moved:
        moved = False
        for move, trial in ((_add_best, more), (_drop_worst, less)):
            if move(columns, members, trial):
                moved = True
                yield list(trial)


def _add_best(columns: list[_Column], members: list[int], steps: list[int]) -> bool:
    """Take the best next step of `members`, in place; whether there was one."""
    able = [i for i in members if steps[i] < len(columns[i].values)]
    if able:
        steps[max(able, key=lambda i: columns[i].values[steps[i]].item())] += 1
    return bool(able)


def _drop_worst(columns: list[_Column], members: list[int], steps: list[int]) -> bool:
    """Take back the worst last step of `members`, in place; whether there was one."""
    able = [i for i in members if steps[i] > 0]
    if able:
        steps[min(able, key=lambda i: columns[i].values[steps[i] - 1].item())] -= 1
    return bool(able)


def _kept(space: Space, columns: list[_Column], steps: list[int]) -> Tensor:
    kept = [0.0] * len(space.sets)  # a plain list: writing tensor elements one by one is ten times slower
    for column, step in zip(columns, steps, strict=True):
        for index in column.sets:
            kept[index] = float(column.counts[step])
    return torch.tensor(kept, dtype=torch.float64)


def _spent(space: Space, columns: list[_Column], steps: list[int]) -> float:
    return space.kept_parameters(_kept(space, columns, steps)).item()
