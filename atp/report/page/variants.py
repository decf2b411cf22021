"""Runs that differ by their seed alone, as one point of a comparison: means, and what the runs have in common."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from atp.report.page.tasks import Score, scores
from atp.report.record import Record
from atp.report.values import finite, number_at


@dataclass(frozen=True)
class Variant:
    """One experiment: a name, and its runs, one a seed."""

    name: str
    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """Stands for what all its runs share: strategy, sparsity, settings."""
        return self.records[0]

    @property
    def strategy(self) -> str:
        """What colours its points."""
        return self.first.strategy or "run"

    @property
    def perplexity(self) -> float | None:
        """Mean over seeds; not finite where one run's is not."""
        return self._mean(lambda record: record.perplexity)

    @property
    def perplexity_std(self) -> float | None:
        """Over seeds, `None` with a single one."""
        values = [value for record in self.records if (value := finite(record.perplexity)) is not None]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def parameters(self) -> float | None:
        """Mean over seeds."""
        return self._mean(lambda record: record.parameters)

    def cost(self, *path: str) -> float | None:
        """The median over seeds of a figure of size or speed."""
        values = [value for record in self.records if (value := finite(number_at(record.cost, *path))) is not None]
        return statistics.median(values) if values else None

    @cached_property
    def scores(self) -> dict[str, Score]:
        """By task: of a single run as they are; of several, the mean, without an interval."""
        found = [scores(record.metrics) for record in self.records]
        if len(found) == 1:
            return found[0]
        return {task: _mean_score(task, found) for task in found[0] if all(task in each for each in found)}

    def _mean(self, of: Callable[[Record], float | None]) -> float | None:
        values = [value for record in self.records if (value := of(record)) is not None]
        return statistics.fmean(values) if values else None


def group(records: Sequence[Record]) -> list[Variant]:
    """Runs of the same settings, seeds aside, together; a run without a recipe stands alone, and so do runs whose
    seeds are the same too: what sets them apart (a machine, a launcher) is not in their recipes.

    The rows of one comparison are of one recipe, so that strategy, sparsity and a learning rate other than the
    recipe's tell them apart.
    """
    grouped: dict[object, list[Record]] = {}
    for index, record in enumerate(records):
        settings = record.comparison or (repr(sorted(record.settings.items())) if record.recipe else index)
        grouped.setdefault((record.strategy, record.sparsity, _own_rate(record), settings), []).append(record)
    together = [part for members in grouped.values() for part in _by_seeds(members)]
    names = [_name(members) for members in together]
    return [
        Variant(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, together, strict=True)
    ]


def _by_seeds(records: list[Record]) -> list[list[Record]]:
    """All of them, where each has seeds of its own; else one by one. A comparison has no run twice."""
    seeds = {record.seeds for record in records}
    return [records] if len(seeds) == len(records) or records[0].comparison else [[record] for record in records]


def _name(records: Sequence[Record]) -> str:
    """Strategy, sparsity and rate of the rows of a comparison; the name of another run."""
    first = records[0]
    if len(records) == 1 and first.comparison is None:
        return first.name
    removed = "" if first.sparsity is None else f" {first.sparsity * 100:.4g} %"
    rate = _own_rate(first)
    return f"{first.strategy}{removed}" + ("" if rate is None else f", learning rate {rate:.6g}")


def _own_rate(record: Record) -> float | None:
    """The learning rate of a comparison's row, where it is not the recipe's."""
    return number_at(record.metrics, "learning_rate")


def _mean_score(task: str, found: Sequence[dict[str, Score]]) -> Score:
    values = [each[task].value for each in found]
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if len(known) == len(values) else None
    return Score(task, found[0][task].metric, mean, None, None, found[0][task].rows)
