"""Rows -> cells. Oracle: numpy, and numbers that can be worked out in the head."""

import random

import numpy as np
import pytest

from atp.report import by_sparsity, markdown, summarise
from tests.report.rows import ACTIVATION, MAGNITUDE, ROWS, failed, row


def cells(rows=ROWS):
    return {(cell.strategy, cell.sparsity): cell for cell in summarise(rows)}


def test_means_and_sample_deviations():
    found = cells()["atp", 0.4]
    perplexities = np.exp([2.3, 2.4])
    assert found.perplexity.mean == pytest.approx(perplexities.mean())
    assert found.perplexity.std == pytest.approx(perplexities.std(ddof=1))
    assert (found.nll.mean, found.seeds, found.train_seconds) == (pytest.approx(2.35), 2, 60.5)
    assert cells()[MAGNITUDE, 0.2].perplexity.std is None


def test_every_strategy_counts_at_its_best_learning_rate():
    rows = [
        *(row("dense", None, 0, nll, rate=rate) for nll, rate in ((2.3, 2e-3), (2.0, 5e-4))),
        *(row("atp", 0.4, seed, nll, rate=5e-4) for seed, nll in enumerate((2.4, 2.6))),
        row("atp", 0.4, 0, 2.7, rate=2e-3),
        *(row(MAGNITUDE, 0.4, 0, nll, rate=rate) for nll, rate in ((3.4, 5e-4), (3.0, 2e-3), (3.1, 1e-3))),
    ]
    found = cells(rows)
    best = {strategy: (cell.learning_rate, cell.seeds) for (strategy, _), cell in found.items()}
    assert best == {"dense": ("0.0005", 1), "atp": ("0.0005", 2), MAGNITUDE: ("0.002", 1)}
    assert found["atp", 0.4].nll.mean == 2.5
    assert found["atp", 0.4].gap_closed == pytest.approx((3.0 - 2.5) / (3.0 - 2.0))
    text = markdown(summarise(rows))
    assert "| `atp` | 0.0005 | 2 |" in text
    assert f"| `{MAGNITUDE}` | 40 % | {np.exp(3.4):.2f} | {np.exp(3.1):.2f} | {np.exp(3.0):.2f} |" in text
    assert "| `atp` | 40 % | 12.24 ± 1.73 |  | 14.88 |" in text
    assert "| default | 2 |" in markdown(summarise(ROWS))
    assert "Learning rates" not in markdown(summarise(ROWS))


def test_the_worst_row_of_any_run_that_tells():
    rows = [row("atp", 0.4, seed, 2.3) for seed in range(3)]
    assert cells(rows)["atp", 0.4].worst_row_nll is None
    rows[1]["validation"]["worst_row_nll"], rows[2]["validation"]["worst_row_nll"] = 3.1, 6.5
    assert cells(rows)["atp", 0.4].worst_row_nll == 6.5
    assert "| 6.50 |" in markdown(summarise(rows))


def test_a_learning_rate_at_which_seeds_failed_is_not_the_best():
    whole = [row("atp", 0.4, seed, nll, rate=2e-3) for seed, nll in enumerate((3.06, 3.07))]
    found = cells([*whole, row("atp", 0.4, 0, 3.04, rate=4e-3), failed("atp", 0.4, 1)])
    cell = found["atp", 0.4]
    assert (cell.learning_rate, cell.seeds, len(cell.by_rate)) == ("0.002", 2, 2)


def test_distances_to_the_best_rival_and_to_dense():
    found = cells()
    assert found["atp", 0.4].gap_closed == pytest.approx((3.0 - 2.35) / (3.0 - 2.1))
    assert found[MAGNITUDE, 0.4].gap_closed == 0
    assert found[ACTIVATION, 0.4].gap_closed == pytest.approx((3.0 - 4.0) / 0.9)
    assert found["atp", 0.4].relative_nll == pytest.approx(2.35 / 2.1)
    assert found["dense", None].relative_nll == 1
    assert found["dense", None].gap_closed is None
    rival = np.exp([2.9, 3.1]).mean()
    assert found["atp", 0.4].perplexity_to_rival == pytest.approx(np.exp([2.3, 2.4]).mean() / rival)


def test_relative_performance_of_what_is_better_the_lower_it_is():
    def scored(strategy, sparsity, value):
        return row(strategy, sparsity, 0, 2.0) | {"tasks": {"text": {"metric": "ppl", "value": value}}}

    found = cells([scored("dense", None, 10.0), scored("atp", 0.4, 12.5)])
    assert found["atp", 0.4].relative_performance == pytest.approx(0.8)


def test_relative_performance_is_the_mean_share_of_dense_scores_over_tasks():
    def scored(strategy, sparsity, seed, **scores):
        return row(strategy, sparsity, seed, 2.0) | {"tasks": {name: {"value": v} for name, v in scores.items()}}

    rows = [
        scored("dense", None, 0, qa=0.5, words=0.2),
        scored("dense", None, 1, qa=0.7, words=0.4),
        scored("atp", 0.4, 0, qa=0.3, words=0.3),
        row("atp", 0.4, 1, 2.0),
        scored(MAGNITUDE, 0.4, 0, qa=0.3),
        row(ACTIVATION, 0.4, 0, 2.0),
    ]
    found = cells(rows)
    assert found["atp", 0.4].relative_performance == pytest.approx((0.3 / 0.6 + 0.3 / 0.3) / 2)
    assert found["dense", None].scores["qa"].std == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert found["dense", None].relative_performance == pytest.approx(1)
    assert found[MAGNITUDE, 0.4].relative_performance is None
    assert found[ACTIVATION, 0.4].scores == {}
    assert "| qa 0.300, words 0.300 | 75 % |" in markdown(summarise(rows))
    assert cells(rows[2:])["atp", 0.4].relative_performance is None
    rows[:2] = [scored("dense", None, 0, qa=0.5, words=0.0)]
    assert cells(rows)["atp", 0.4].relative_performance is None, "nothing is a share of nothing"


def test_costs_and_their_ratios():
    found = cells()["atp", 0.4]
    assert (found.decode_ms, found.decode_to_dense) == (8.5, pytest.approx(8.5 / 21))
    assert (found.prefill_ms, found.prefill_to_dense) == (42.5, pytest.approx(8.5 / 21))
    assert (found.peak_memory_mib, found.memory_to_dense) == (1100.0, pytest.approx(1.1))
    assert (found.parameters, found.flops_per_token) == (1_000_000, 2_000_000)
    assert found.achieved_sparsity == pytest.approx(0.41)


def test_overlap_is_the_mean_per_kind_and_may_be_unknown():
    found = cells()
    assert found[ACTIVATION, 0.4].overlap == {"kv": 0.75, "mlp": 0.5}
    assert found["atp", 0.4].overlap is None
    assert found["dense", None].overlap is None


def test_without_dense_or_rivals_or_with_a_rival_better_than_dense_nothing_is_made_up():
    without_dense = cells([r for r in ROWS if r["strategy"] != "dense"])["atp", 0.4]
    assert (without_dense.gap_closed, without_dense.relative_nll, without_dense.decode_to_dense) == (None, None, None)
    assert without_dense.perplexity_to_rival is not None
    alone = cells([r for r in ROWS if r["strategy"] in ("dense", "atp")])["atp", 0.4]
    assert (alone.gap_closed, alone.perplexity_to_rival) == (None, None)
    better = cells([row("dense", None, 0, 2.0), row(MAGNITUDE, 0.4, 0, 1.9), row("atp", 0.4, 0, 1.8)])
    assert better["atp", 0.4].gap_closed is None


def test_failed_rows_do_not_count_and_order_does_not_matter():
    shuffled = list(ROWS)
    random.Random(0).shuffle(shuffled)
    assert summarise(shuffled) == summarise(ROWS)
    assert ("paper", 0.4) not in cells()
    assert summarise([failed("atp", 0.4, 0)]) == []


def test_tables_by_sparsity_start_with_dense_and_go_from_best_to_worst():
    tables = by_sparsity(summarise(ROWS))
    assert [(sparsity, [c.strategy for c in here]) for sparsity, here in tables] == [
        (0.2, ["dense", "atp", MAGNITUDE]),
        (0.4, ["dense", "atp", MAGNITUDE, ACTIVATION]),
    ]
    assert [sparsity for sparsity, _ in by_sparsity(summarise(ROWS[:2]))] == [None]
    assert by_sparsity([]) == []
