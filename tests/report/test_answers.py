"""The three questions. Oracle: the rows of `rows.py`, read by eye."""

from atp.report import answers, summarise
from tests.report.rows import ACTIVATION, MAGNITUDE, ROWS, row

WHEN = "When should I prune?"
FAR = "How far can I go?"
HOLD = "Do decisions drawn before tuning still hold after it?"


def test_all_three_are_one_line_each():
    found = answers(summarise(ROWS))
    assert list(found) == [WHEN, FAR, HOLD]
    assert not any("\n" in answer for answer in found.values())


def test_when_ranks_the_timings_at_each_sparsity():
    answer = answers(summarise(ROWS))[WHEN]
    # mean perplexities: exp(2.14), exp(2.18) -> 8.673; exp(2.3) -> 9.974; exp(2.3), exp(2.4) -> 10.5
    assert "20 % removed: while tuning 8.673 (atp), before tuning 9.974 (magnitude)" in answer
    assert "40 % removed: while tuning 10.5 (atp), before tuning" in answer
    assert answer.endswith("after tuning 54.6 (activation)")


def test_how_far_takes_the_largest_sparsity_within_reach_of_dense():
    # nll over dense 2.1: atp 2.16 (1.029) at 20 %, 2.35 (1.119) at 40 %; magnitude 2.3 (1.095) at 20 %
    assert answers(summarise(ROWS))[FAR] == (
        "within 3 % of dense log-perplexity: 20 % removed (atp); "
        "within 10 % of dense log-perplexity: 20 % removed (atp)"
    )
    worse = [row("dense", None, 0, 2.0), row("atp", 0.4, 0, 2.1), row("atp", 0.2, 0, 2.07)]
    assert answers(summarise(worse))[FAR] == (
        "within 3 % of dense log-perplexity: none of those tried; "
        "within 10 % of dense log-perplexity: 40 % removed (atp)"
    )


def test_whether_decisions_hold_looks_at_decisions_drawn_after_tuning_from_the_weights():
    blind = row("tune-then-prune:random", 0.4, 0, 5.0, overlap={"kv": 1.0, "mlp": 1.0})
    answer = answers(summarise([*ROWS, blind]))[HOLD]
    assert answer.endswith("40 % removed: kv 75 %, mlp 50 %")


def test_questions_without_rows_are_left_out():
    assert answers(summarise([r for r in ROWS if r["strategy"] == "atp"])) == {}
    found = answers(summarise([r for r in ROWS if r["strategy"] in (MAGNITUDE, ACTIVATION)]))
    assert list(found) == [WHEN, HOLD]
