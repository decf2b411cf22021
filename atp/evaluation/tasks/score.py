"""What a model reached on one task, with what is needed to trust it and to compare another model with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from atp.errors import DataError
from atp.evaluation.metrics import METRICS, metric_of
from atp.evaluation.statistics import Difference, Estimate, compare, estimate, unpaired


@dataclass(frozen=True)
class TaskScore:
    """`value` of the primary `metric`, and all `metrics` with their standard errors and 95 % intervals.

    Attributes:
        stderr: standard error over rows, `None` with a single one.
        truncated: rows of which the model saw less than there was.
        kind: `choice`, `generation` or `text` of local tasks, `harness` for the harness's own.
        protocol: how it was measured, in full.
        fingerprint: hash of the rows; two scores with the same one are paired row by row.
        items: by name, one value a row, in the rows' order: what `metrics` were computed from.
    """

    metric: str
    value: float
    stderr: float | None
    rows: int
    metrics: dict[str, Estimate] = field(default_factory=dict)
    truncated: int = 0
    kind: str = "harness"
    protocol: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    items: dict[str, list[float]] | None = None


def scored(kind: str, items: Mapping[str, Sequence[float]], **about: Any) -> TaskScore:
    """The score of a local task from its items; `about` are further fields of `TaskScore`."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in items.items()}
    metrics = {
        name: estimate(arrays, metric, name if name in arrays else None) for name, metric in METRICS[kind].items()
    }
    name, first = next(iter(metrics.items()))
    return TaskScore(
        name,
        first.value,
        first.stderr,
        len(next(iter(arrays.values()))),
        metrics,
        kind=kind,
        items={name: [float(value) for value in values] for name, values in arrays.items()},
        **about,
    )


def compare_scores(task: str, baseline: TaskScore, other: TaskScore) -> dict[str, Difference]:
    """By metric, `other` against `baseline` on the same rows; metrics that no row has a value of are not paired.

    Raises:
        DataError: where the two were scored on different rows.
    """
    if (baseline.fingerprint, baseline.rows) != (other.fingerprint, other.rows):
        raise DataError(f"{task}: the two models were scored on different rows: score both on the same ones")
    first, second = (
        {name: np.asarray(values) for name, values in (score.items or {}).items()} for score in (baseline, other)
    )
    found = {}
    for name in baseline.metrics.keys() & other.metrics.keys():
        known = baseline.kind in METRICS or (name in first and name in second)
        if not known:
            found[name] = unpaired(baseline.metrics[name].value, other.metrics[name].value)
            continue
        binary = name in first and all(np.isin(side[name], (0, 1)).all() for side in (first, second))
        needed = first if baseline.kind in METRICS else {name: first[name]}
        found[name] = compare(
            needed, {key: second[key] for key in needed}, metric_of(baseline.kind, name), name if binary else None
        )
    return {name: found[name] for name in baseline.metrics if name in found}
