"""Drawing rows again: a statistic's values over resamples of its rows, and the interval they give.

The percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) from the same draws at every call: rows are what was
sampled, so rows are what is drawn again.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 9_999
SEED = 0
PERCENTILES = (2.5, 97.5)
DRAWN_AT_ONCE = 1 << 21
"""Row numbers in memory at a time."""


def draws(rows: int, resamples: int = RESAMPLES) -> Iterator[NDArray[np.intp]]:
    """Numbers of drawn rows, `(some resamples, rows)`, which together are the same however many come at once."""
    generator = np.random.default_rng(SEED)
    at_once = max(DRAWN_AT_ONCE // rows, 1)
    for first in range(0, resamples, at_once):
        yield generator.integers(rows, size=(min(at_once, resamples - first), rows))


def resampled(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]], rows: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """`(resamples,)` values of `statistic`, which takes row numbers `(some resamples, rows)`."""
    return np.concatenate([statistic(index) for index in draws(rows, resamples)])


def interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of the 95 % interval that resampled values give."""
    low, high = np.percentile(drawn, PERCENTILES).tolist()
    return low, high
