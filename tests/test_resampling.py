"""Drawing rows again. Oracles: all draws taken at once; scipy's bootstrap, in `evaluation/test_statistics.py`."""

import numpy as np

from atp import resampling
from atp.resampling import SEED, draws, interval, resampled


def test_rows_drawn_in_pieces_are_those_drawn_at_once(monkeypatch):
    monkeypatch.setattr(resampling, "DRAWN_AT_ONCE", 300)
    pieces = list(draws(40, 100))
    assert len(pieces) > 10
    assert (np.concatenate(pieces) == np.random.default_rng(SEED).integers(40, size=(100, 40))).all()


def test_the_interval_of_a_mean_holds_it_and_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = interval(resampled(lambda index: values[index].mean(axis=1), len(values)))
    assert low < values.mean() < high
    assert abs((high - low) / (2 * 1.96 * values.std(ddof=1) / 20) - 1) < 0.05
