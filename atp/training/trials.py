"""Trials: how a starting decision shares the budget out over depth and kinds of groups, judged by what it costs.

Scores tell groups of one set apart well. Between sets they hold for small changes only: KV groups cost the more beyond
what scores say the more of them go, and blocks, too, cost more or less by depth. So other shares are tried. Each is
made a decision and compensated for as if it were final, but with fewer rows and readers as they are, and loss on rows
that were not refitted to says whether it is better.

SmolLM2-135M, medical, `width` 50 %: a tilt of 0.6 and attention of 0.25 are better than the defaults by 0.030 nats so,
as by whole runs, and attention alone by nothing, as by whole runs; where each layer is refitted by itself, trials say
otherwise of both. That is seed 0; rows of seed 1 spread too much to tell (`benchmarks/LOG.md`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from atp.processes import from_first

ROWS = 64
"""Training rows that a trial looks at."""

BATCHES = 8
"""Into how many batches they are dealt at least, where there are as many: their spread is what a gain is held to."""

_TILT, _ATTENTION, _FLOOR = 0.3, 0.25, 0.2

_STEPS = (
    (_TILT, _ATTENTION, 0.0),  # on SmolLM2 at 50 % neither is better without the other
    (_TILT, 0.0, 0.0),
    (0.0, _ATTENTION, 0.0),
    (-_TILT, 0.0, 0.0),
    (0.0, -_ATTENTION, 0.0),
    (-_TILT, -_ATTENTION, 0.0),
    (0.0, 0.0, _FLOOR),
    (0.0, 0.0, -_FLOOR),
)
"""Of tilt, attention and floor, in the order in which they are tried."""


@dataclass(frozen=True)
class Lean:
    """What a global ranking makes of depth, of attention, and of the least that stays (`ATPConfig.init_tilt`, ...)."""

    tilt: float
    attention: float
    floor: float

    def neighbours(self) -> Iterator["Lean"]:
        """A step away."""
        for tilt, attention, floor in _STEPS:
            found = Lean(round(self.tilt + tilt, 6), round(self.attention + attention, 6), round(self.floor + floor, 6))
            if 0.0 <= found.floor <= 1.0:
                yield found


class Trials:
    """A pattern search.

    Args:
        cost: of a decision, `(batches, 2)`: nats of a batch's tokens, and how many these are; the same batches always.
        most: how many decisions are tried besides the first.
        quiet: no progress bar.

    Attributes:
        chosen: what the last search has found; None before there was one.
    """

    def __init__(self, cost: Callable[[Mapping[str, Tensor]], Tensor], most: int, quiet: bool = False) -> None:
        self._cost, self._most, self._quiet = cost, most, quiet
        self.chosen: Lean | None = None

    def best(self, first: Lean, decide: Callable[[Lean], Mapping[str, Tensor]]) -> Lean:
        """The best that is found from `first`, to a neighbour that is better, until none is or `most` have been tried.

        Args:
            decide: the decision that a lean leads to; one that another has led to already is not tried again.
        """
        if not self._most:
            return first
        with tqdm(desc="atp: starts tried", total=self._most + 1, leave=False, disable=self._quiet) as bar:
            seen: set[bytes] = set()
            best, least = first, None
            todo = [first]
            while todo and len(seen) <= self._most:
                lean = todo.pop(0)
                decision = from_first(decide(lean))  # processes that disagree would wait for one another
                if (key := _key(decision)) in seen:
                    continue
                seen.add(key)
                cost = self._cost(decision)
                bar.update()
                if least is None or is_less(cost, least):
                    best, least = lean, cost
                    todo = list(lean.neighbours())
        self.chosen = best
        return best

    def metrics(self) -> dict[str, float]:
        """What was found, by setting."""
        return {f"init_{name}": value for name, value in (self.state() or {}).items()}

    def state(self) -> dict[str, float] | None:
        """What was found; None before a search."""
        return None if self.chosen is None else dataclasses.asdict(self.chosen)

    def load_state(self, found: Mapping[str, float] | None) -> None:
        """Know what `state` gave."""
        self.chosen = None if found is None else Lean(**found)


def is_less(cost: Tensor, other: Tensor) -> bool:
    """Whether a token costs less, by more than that difference's standard error over batches; both `(batches, 2)`."""
    tokens, batches = other[:, 1], len(other)
    more = cost[:, 0] - other[:, 0]
    mean = more.sum() / tokens.sum()
    error = ((more - mean * tokens).square().sum() * batches / max(batches - 1, 1)).sqrt() / tokens.sum()
    return batches > 1 and bool(mean < -error)


def _key(decision: Mapping[str, Tensor]) -> bytes:
    return torch.cat([mask > 0 for mask in decision.values()]).numpy().tobytes()
