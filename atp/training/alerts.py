"""Alerts: what a run's figures say is going wrong, while something can still be done.

Pure functions of what has been seen so far. Each gives at most one alert, with the value that made it and what usually
helps. What a decision takes from whole halves on purpose (`depth`) is no alert.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from atp.structure.space import HIDDEN, SWITCHES

OFF_BUDGET = 0.05
"""Of the prunable parameters: how far from the asked sparsity is too far when the freeze is near."""
RESTLESS = 0.02
"""Share of all groups that changes a step when the freeze is near."""
NEAR = 0.8
"""Share of the learning steps from which on the freeze is near."""
NEXT_TO_NOTHING = 0.05
"""Share of a set's groups; a decision on budget always leaves a few."""
DIVERGED_NATS = 0.1
EVALUATIONS = 3
"""How many evaluations in a row must be worse than the best one."""
SPOILT_NATS = 0.02
"""How much worse than at first the dense model may be. Gemma-3-270M on medical text, step 45 of 150: 0.10 worse at
2e-3, 0.19 better at 1e-3 and 0.27 at 5e-4."""
UNDECIDED_BITS = 1e-3
"""Mean entropy of the keep probabilities below which a generator has nothing left to choose."""


@dataclass(frozen=True)
class Alert:
    """`name` tells what kind it is: one run says each once."""

    name: str
    message: str
    value: float | None = None


@dataclass(frozen=True)
class Seen:
    """One log of a run: `figures`, flat and without a prefix, and the groups that every set keeps, by kind."""

    step: int
    figures: Mapping[str, float]
    kept: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What does not change in a run.

    Attributes:
        sizes: groups of every set, by kind; `blocks`: the block of each, or None.
        learned: whether a generator decides, and not a formula.
        uniform: whether all blocks must be alike.
        on_budget: whether every decision is on budget, which with few large groups may not be just what is asked.
    """

    start_step: int
    freeze_step: int
    sparsity: float
    sizes: Mapping[str, Sequence[int]]
    blocks: Mapping[str, Sequence[int | None]]
    learned: bool = True
    uniform: bool = False
    on_budget: bool = False

    def is_near_freeze(self, step: int) -> bool:
        """Whether the last part of the learning steps has begun, and the freeze has not."""
        steps = self.freeze_step - self.start_step
        return self.learned and self.start_step + NEAR * steps <= step < self.freeze_step

    def phase_begins(self, step: int) -> int:
        """After how many steps the model began to be what it is after `step`: dense, being pruned, or final."""
        return max(begin for begin in (-1, self.start_step, self.freeze_step) if begin < step)


def alerts(plan: Plan, seen: Sequence[Seen]) -> list[Alert]:
    """What the last of `seen` gives reason for, in the light of those before it."""
    checks: tuple[Callable[[Plan, Sequence[Seen]], Alert | None], ...] = (
        *(not_finite, off_budget, restless, emptied, diverging, spoilt, alike),
    )
    return [alert for check in checks if (alert := check(plan, seen)) is not None] if seen else []


def not_finite(_plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """A figure is NaN or infinite."""
    bad = [name for name, value in seen[-1].figures.items() if not math.isfinite(value)]
    if not bad:
        return None
    value = seen[-1].figures[bad[0]]
    return Alert(
        "not finite",
        f"{', '.join(bad)} is {value} at step {seen[-1].step}: lower the learning rate or look at the data",
        value,
    )


def off_budget(plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """Shortly before the freeze the decision is far from what is asked, and will be cut to it at once."""
    last = seen[-1]
    reached = last.figures.get("sparsity")
    if plan.on_budget or reached is None or not plan.is_near_freeze(last.step):
        return None
    if abs(reached - plan.sparsity) <= OFF_BUDGET:
        return None
    return Alert(
        "budget",
        f"sparsity is {reached:.3f} at step {last.step}, {plan.sparsity:.3f} is asked, and the freeze (step "
        f"{plan.freeze_step}) will make up the difference at once: set on_budget, or raise budget_weight or freeze_at",
        reached,
    )


def restless(plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """Shortly before the freeze the decision still changes much from step to step."""
    if not plan.is_near_freeze(seen[-1].step):
        return None
    near = [s.figures["churn"] for s in seen if plan.is_near_freeze(s.step) and "churn" in s.figures]
    if not near:
        return None
    churn = sum(near) / len(near)
    if churn <= RESTLESS:
        return None
    return Alert(
        "churn",
        f"{churn * 100:.1f} % of all groups change a step, and the freeze comes at step {plan.freeze_step}: lower "
        "generator_lr or noise_end, or raise freeze_at",
        churn,
    )


def emptied(plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """The final decision leaves next to nothing of a set of groups, in a space where halves are not switched off."""
    last = seen[-1]
    if not last.figures.get("frozen") or any(kind in SWITCHES for kind in plan.sizes):
        return None
    parts, count = [], 0
    for kind, kept in last.kept.items():
        sets = zip(plan.blocks[kind], kept, plan.sizes[kind], strict=True)
        empty = [block for block, left, size in sets if left <= NEXT_TO_NOTHING * size and kind != HIDDEN]
        if empty:
            count += len(empty)
            parts.append(f"{kind} of block {', '.join(map(str, empty))}")
    if not parts:
        return None
    return Alert(
        "empty",
        f"next to nothing is left of {'; '.join(parts)}: usually a sign of too high a sparsity, or of scores that do "
        "not compare over blocks; try protect, init_ranking: block, or a lower sparsity",
        float(count),
    )


def diverging(plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """Held-out loss rises while training loss falls, with no change in whether and how the model is pruned."""
    if "eval_loss" not in seen[-1].figures:
        return None
    seen = [one for one in seen if one.step > plan.phase_begins(seen[-1].step)]
    losses = [(s.figures.get("eval_loss"), s.step) for s in seen]
    held_out = [(value, step) for value, step in losses if value is not None and math.isfinite(value)]
    if len(held_out) <= EVALUATIONS:
        return None
    best, at = min(held_out)
    since = [value for value, step in held_out if step > at]
    if len(since) < EVALUATIONS or min(since[-EVALUATIONS:]) <= best + DIVERGED_NATS:
        return None
    training = [(s.step, s.figures["loss"]) for s in seen if "loss" in s.figures]
    before, after = [v for step, v in training if step <= at], [v for step, v in training if step > at]
    if not before or not after or after[-1] >= before[-1]:
        return None
    return Alert(
        "diverging",
        f"held-out loss has risen from {best:.3f} (step {at}) to {since[-1]:.3f} while training loss fell to "
        f"{after[-1]:.3f}: stop earlier, give more data, or lower the learning rate or LoRA's rank",
        since[-1],
    )


def spoilt(_plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """Tuning has made the model worse before anything of it was removed; what will be left is made to follow it."""
    dense = [(s.figures["held_out_dense"], s.step) for s in seen if "held_out_dense" in s.figures]
    if len(dense) < 2 or dense[-1][1] != seen[-1].step:
        return None
    (first, _), (last, step) = dense[0], dense[-1]
    if not last > first + SPOILT_NATS:
        return None
    return Alert(
        "spoilt",
        f"with nothing removed the model has {last:.3f} nats a token on held-out rows by step {step}, and had "
        f"{first:.3f} when it was first measured, so that tuning harms it: lower the learning rate or warm it up, or "
        "see whether held-out rows are of the domain",
        last,
    )


def alike(plan: Plan, seen: Sequence[Seen]) -> Alert | None:
    """The generator has collapsed: all blocks keep the same, or it has no choice left long before the freeze."""
    last = seen[-1]
    if not plan.learned or plan.uniform or not plan.start_step <= last.step < plan.freeze_step:
        return None
    entropy = last.figures.get("entropy")
    if entropy is not None and entropy < UNDECIDED_BITS and not plan.is_near_freeze(last.step):
        return Alert(
            "collapse",
            f"keep probabilities are all 0 or 1 at step {last.step} (mean entropy {entropy:.1e} bits), so that nothing "
            "more is learned: lower generator_lr, or raise temperature",
            entropy,
        )
    if not plan.is_near_freeze(last.step) or not _all_blocks_alike(plan, last):
        return None
    return Alert(
        "collapse",
        f"all blocks keep the same shares at step {last.step}: the generator tells no block from another; raise "
        "generator_lr, or start from a criterion (init)",
        0.0,
    )


def _all_blocks_alike(plan: Plan, last: Seen) -> bool:
    """Whether something is pruned, in equal parts of many blocks, whose sizes would allow others."""
    by_block = {kind: kept for kind, kept in last.kept.items() if len(kept) >= 4 and max(plan.sizes[kind]) >= 8}
    equal = all(len(set(kept)) == 1 and kept[0] < plan.sizes[kind][0] for kind, kept in by_block.items())
    return bool(by_block) and equal
