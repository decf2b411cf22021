"""Intervals, paired tests, metrics. Oracles: scipy's bootstrap, scikit-learn's F1, p-values by hand."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from atp.errors import DataError
from atp.evaluation.metrics import bits_per_byte, macro_f1, mean_of, token_perplexity
from atp.evaluation.statistics import compare, estimate
from atp.resampling import RESAMPLES

RNG = np.random.default_rng(7)
ROWS = 60


def classes(rows=ROWS):
    return {"label": RNG.integers(4, size=rows).astype(float), "chosen": RNG.integers(5, size=rows).astype(float)}


def texts(rows=ROWS):
    tokens = RNG.integers(5, 50, size=rows).astype(float)
    return {"nll": tokens * RNG.uniform(1, 4, size=rows), "tokens": tokens, "bytes": tokens * 4}


def test_macro_f1_is_scikit_learns_also_of_every_resample():
    items = classes()
    index = RNG.integers(ROWS, size=(20, ROWS))
    index[0] = index[0, 0]  # one row again and again: most classes are absent
    found = macro_f1({name: values[index] for name, values in items.items()})
    wanted = [f1_score(items["label"][i], items["chosen"][i], average="macro") for i in index]
    assert found == pytest.approx(wanted)


def test_macro_f1_by_hand():
    items = {"label": np.array([0.0, 0, 0, 1]), "chosen": np.array([0.0, 0, 1, 1])}
    assert macro_f1(items) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_perplexity_weighs_tokens_and_not_rows():
    items = {"nll": np.array([2.0, 30.0]), "tokens": np.array([2.0, 10.0]), "bytes": np.array([4.0, 60.0])}
    assert token_perplexity(items) == pytest.approx(np.exp(32 / 12))
    assert bits_per_byte(items) == pytest.approx(32 / 64 / np.log(2))


@pytest.mark.parametrize(
    ("items", "metric"), [(classes(), macro_f1), (texts(), token_perplexity), ({"x": RNG.random(ROWS)}, mean_of("x"))]
)
def test_the_interval_is_scipys_percentile_bootstrap(items, metric):
    found = estimate(items, metric)
    scipys = bootstrap(
        tuple(items.values()),
        lambda *drawn, axis: metric(dict(zip(items, drawn, strict=True))),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        rng=11,
    )
    width = found.high - found.low
    assert found.low == pytest.approx(scipys.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(scipys.confidence_interval.high, abs=0.05 * width)
    assert found.stderr == pytest.approx(scipys.standard_error, rel=0.05)
    assert estimate(items, metric) == found, "drawn with a seed of its own"


def test_the_standard_error_of_a_mean_needs_no_resampling():
    values = RNG.random(ROWS)
    assert estimate({"x": values}, mean_of("x"), "x").stderr == pytest.approx(values.std(ddof=1) / ROWS**0.5)


def test_one_row_has_no_interval():
    assert estimate({"x": np.array([0.5])}, mean_of("x"), "x").low is None


def test_mcnemar_by_hand():
    """10 rows differ, 2 for the better: two tails of a fair coin's 0, 1 and 2 heads of 10."""
    before, after = np.zeros(40), np.zeros(40)
    before[:8], after[8:10], before[20:], after[20:] = 1, 1, 1, 1
    found = compare({"acc": before}, {"acc": after}, mean_of("acc"), "acc")
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert found.difference == pytest.approx(-6 / 40)
    assert compare({"acc": before}, {"acc": before}, mean_of("acc"), "acc").p == 1.0


def test_permutations_of_few_rows_are_counted_by_hand():
    """Five rows, all better: of the 32 ways to swap them, two are as far from nothing."""
    before = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    found = compare({"x": before}, {"x": before + np.array([0.1, 0.2, 0.3, 0.15, 0.25])}, mean_of("x"))
    assert found.p == pytest.approx(2 / 32)
    assert found.difference == pytest.approx(0.2)


@pytest.mark.parametrize(("make", "metric"), [(classes, macro_f1), (texts, token_perplexity)])
def test_a_change_has_an_interval_and_a_p_value_of_its_size(make, metric):
    before = make()
    if metric is macro_f1:
        better = before | {"chosen": np.where(np.arange(ROWS) < 50, before["label"], before["chosen"])}
    else:
        better = before | {"nll": before["nll"] * RNG.uniform(0.5, 0.9, ROWS)}
    found = compare(before, better, metric)
    assert found.difference == pytest.approx(metric(better) - metric(before))
    assert found.low < found.difference < found.high
    assert found.relative == pytest.approx(metric(better) / metric(before) - 1)
    assert found.relative_low < found.relative < found.relative_high
    assert found.p < 0.001
    shuffled = compare(before, {name: values[::-1] for name, values in before.items()}, metric)
    assert shuffled.p > 0.9, "the same rows in another order score the same"
    none = compare(before, before, metric)
    assert (none.low, none.high, none.p) == (0.0, 0.0, 1.0)


def test_other_rows_cannot_be_paired():
    with pytest.raises(DataError, match="3 rows cannot be paired with 4"):
        compare({"x": np.zeros(3)}, {"x": np.zeros(4)}, mean_of("x"))
