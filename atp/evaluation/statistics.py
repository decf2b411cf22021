"""Intervals and paired tests by resampling rows, as `atp.resampling` draws them.

Two models are compared on the same rows, drawn together. The p-value of right or wrong is McNemar's exact one (the
binomial test over the rows on which the two differ); of anything else, a permutation test's that swaps the two models
within rows. Both are two-sided. Not covered: correction for many comparisons.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atp.errors import ConfigError, DataError
from atp.evaluation.metrics import Items, Metric
from atp.resampling import DRAWN_AT_ONCE, RESAMPLES, SEED, draws, interval, resampled


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error, and the ends of its 95 % interval; `None` where rows are too few or not known."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """What changed from the baseline's `baseline` to `value`; `relative` is `value / baseline - 1`.

    `low`, `high` and their relatives are ends of 95 % intervals, `p` comes from `test`; `None` where nothing is paired.
    """

    baseline: float
    value: float
    difference: float
    low: float | None
    high: float | None
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    p: float | None
    test: str | None


def estimate(items: Items, metric: Metric, mean: str | None = None) -> Estimate:
    """`metric` of `items` with its interval.

    Args:
        mean: the item whose mean the metric is, if it is one: its standard error then needs no resampling.
    """
    value, rows = float(metric(items)), _rows(items)
    if rows < 2:
        return Estimate(value, None, None, None)
    drawn = resampled(lambda index: metric(_taken(items, index)), rows)
    low, high = interval(drawn)
    spread = items[mean].std(ddof=1) / np.sqrt(rows) if mean else drawn.std(ddof=1)
    return Estimate(value, float(spread), low, high)


def compare(baseline: Items, other: Items, metric: Metric, right_or_wrong: str | None = None) -> Difference:
    """`metric` of `other` against that of `baseline`, row by row.

    Args:
        right_or_wrong: the item of zeros and ones whose mean the metric is, if it is one.

    Raises:
        DataError: where the two have not the same number of rows.
        ConfigError: where scipy is not installed.
    """
    rows = _rows(baseline)
    if rows != _rows(other):
        raise DataError(f"{rows} rows cannot be paired with {_rows(other)}: score both models on the same rows")
    before, after = float(metric(baseline)), float(metric(other))
    if rows < 2:
        return unpaired(before, after)
    drawn = [(metric(_taken(baseline, index)), metric(_taken(other, index))) for index in draws(rows)]
    first, second = (np.concatenate(side) for side in zip(*drawn, strict=True))
    low, high = interval(second - first)
    relative_low, relative_high = None, None
    if before and (first != 0).all():
        relative_low, relative_high = interval(second / first - 1)
    if right_or_wrong:
        p, test = _mcnemar(baseline[right_or_wrong], other[right_or_wrong]), "McNemar, exact"
    else:
        p, test = _permuted(baseline, other, metric), "paired permutation"
    return dataclasses.replace(
        unpaired(before, after),
        low=low,
        high=high,
        relative_low=relative_low,
        relative_high=relative_high,
        p=p,
        test=test,
    )


def unpaired(baseline: float, value: float) -> Difference:
    """The plain difference of two figures that come without rows."""
    relative = value / baseline - 1 if baseline else None
    return Difference(baseline, value, value - baseline, None, None, relative, None, None, None, None)


def _mcnemar(baseline: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """McNemar (1947), exact: of the rows that one got right and the other wrong, half are expected to be either's."""
    lost, won = int((baseline > other).sum()), int((other > baseline).sum())
    return float(scipy().binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _permuted(baseline: Items, other: Items, metric: Metric) -> float:
    rows = _rows(baseline)
    both = {name: np.concatenate([baseline[name], other[name]]) for name in baseline}

    def difference(x: NDArray[np.intp], y: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        assert axis == -1
        return metric(_taken(both, y)) - metric(_taken(both, x))

    found = scipy().permutation_test(
        (np.arange(rows), np.arange(rows, 2 * rows)),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(DRAWN_AT_ONCE // rows, 1),
        axis=-1,
        rng=SEED,
    )
    return float(found.pvalue)


def scipy() -> Any:
    """What pairs rows: `scipy.stats`.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        return importlib.import_module("scipy.stats")
    except ImportError:
        raise ConfigError("paired tests need scipy, which is not installed: pip install 'atp[tasks]'") from None


def _taken(items: Items, index: NDArray[np.intp]) -> Items:
    return {name: values[index] for name, values in items.items()}


def _rows(items: Items) -> int:
    return len(next(iter(items.values())))
