"""Several runs side by side. Oracles: domination by brute force, intervals by hand, figures that went in."""

import json
import random
import re
import sys

import pytest

from atp.errors import ConfigError
from atp.report import write_comparison
from atp.report.page.fronts import Point, pareto
from atp.report.page.regressions import data_warnings, same_data
from atp.report.page.texts import compared, moved, short
from atp.report.page.variants import group
from atp.report.record import read_run
from atp.report.sources import read_sources
from atp.report.values import lower_is_better
from tests.report import folders
from tests.report.rows import ROWS, row


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    """Charts are looked at elsewhere."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)


def runs(tmp_path, *measured, settings=None):
    """Runs of these metrics, called a, b, c ..."""
    return [
        read_run(
            folders.run(tmp_path / chr(97 + i), False, each, (settings or {}).get(i, folders.recipe(freeze_at=i / 10)))
        )
        for i, each in enumerate(measured)
    ]


@pytest.mark.parametrize("lower", [False, True])
def test_the_front_is_what_none_dominates(lower):
    rng = random.Random(0)
    for _ in range(20):
        points = [Point(str(i), "s", rng.randrange(8), rng.randrange(8)) for i in range(15)]

        def beats(one, other):
            better = one.quality <= other.quality if lower else one.quality >= other.quality
            return better and one.cost <= other.cost and (one.cost, one.quality) != (other.cost, other.quality)

        expected = {(p.cost, p.quality) for p in points if not any(beats(q, p) for q in points)}
        front = pareto(points, lower)
        assert [(p.cost, p.quality) for p in front] == sorted(expected)


def test_differences_are_from_the_baseline_and_say_which_way(tmp_path):
    records = runs(tmp_path, folders.metrics(0.6, 20.0), folders.metrics(0.8, 19.0))
    report = write_comparison(records, tmp_path / "page.html")
    rows = {row[0].text: dict(zip(report.table.columns, row, strict=True)) for row in report.table.rows}
    assert rows["a"]["run"].change == "baseline"
    assert (rows["b"]["perplexity"].change, rows["b"]["perplexity"].verdict) == ("-5.0 %", "better")
    assert rows["b"]["parameters"].verdict == "worse"
    swapped = write_comparison(records, tmp_path / "page.html", "b")
    assert [row[0].text for row in swapped.table.rows] == ["b", "a"]
    assert swapped.table.rows[1][-3].verdict == "worse"
    page = (tmp_path / "page.html").read_text()
    assert re.search(r'class="change worse">[^<]+ worse</span>', page)
    with pytest.raises(ConfigError, match="--baseline c is none of the runs: give one of a, b"):
        write_comparison(records, tmp_path / "page.html", "c")


def test_perplexity_regresses_above_the_tolerance_only(tmp_path):
    measured = [folders.metrics(perplexity=p) for p in (20.0, 20.5, 21.0, float("nan"))]
    report = write_comparison(runs(tmp_path, *measured), tmp_path / "page.html")
    assert [line.split(":")[0] for line in report.regressions] == ["c", "d"]
    assert "(+5.0 %)" in report.regressions[0]
    assert "not finite" in report.regressions[1]


def test_scores_regress_where_intervals_are_apart(tmp_path):
    measured = [folders.metrics(accuracy=a) for a in (0.60, 0.52, 0.50, 0.70)]
    report = write_comparison(runs(tmp_path, *measured), tmp_path / "page.html")
    half = 1.96 * 0.022
    assert 0.52 + half > 0.60 - half
    assert 0.50 + half < 0.60 - half
    assert [line.split(":")[0] for line in report.regressions] == ["c"]
    assert "95 % intervals apart" in report.regressions[0]


def test_paired_items_see_what_intervals_do_not(tmp_path):
    base = [float(i % 5 > 1) for i in range(500)]  # 0.60
    steady = [0.0 if i % 25 == 2 else value for i, value in enumerate(base)]  # 0.56, never better than the base
    rng = random.Random(0)
    shuffled = rng.sample(base, 500)  # 0.60 on other items
    measured = [folders.metrics(accuracy=sum(items) / 500, items={"acc": items}) for items in (base, steady, shuffled)]
    report = write_comparison(runs(tmp_path, *measured), tmp_path / "page.html")
    assert [line.split(":")[0] for line in report.regressions] == ["b"]
    assert "paired over 500 items" in report.regressions[0]


@pytest.mark.parametrize(
    ("prints", "same"), [(("aa", "aa"), True), (("aa", "bb"), False), (("aa", None), None), ((None, None), None)]
)
def test_different_and_unknown_data_are_said(tmp_path, prints, same):
    records = runs(tmp_path, *(folders.metrics(fingerprint=each) for each in prints))
    assert same_data(records) is same
    text = " ".join(data_warnings(records))
    assert ("measured on different data" in text) == (same is False)
    assert ("unknown" in text) == (same is None)


def test_other_calibration_text_is_another_run_on_the_same_data(tmp_path):
    made = [folders.metrics(fingerprint="a") for _ in range(2)]
    for name, metrics in zip("xy", made, strict=True):
        metrics["data"]["fingerprints"]["calibration"] = name
    records = runs(tmp_path, *made)
    assert same_data(records) is True
    assert not data_warnings(records)


def test_seeds_are_one_experiment_and_other_settings_are_not(tmp_path):
    one, other = folders.recipe(), folders.recipe(freeze_at=0.3)
    again = folders.recipe(seed=7) | {"output_dir": "elsewhere"}
    records = runs(
        tmp_path, *[folders.metrics(perplexity=p) for p in (20.0, 22.0, 30.0)], settings={0: one, 1: again, 2: other}
    )
    variants = group(records)
    assert [[record.name for record in variant.records] for variant in variants] == [["a", "b"], ["c"]]
    assert variants[0].perplexity == 21.0
    report = write_comparison(records, tmp_path / "page.html")
    assert "21.00 ± 1.41" in (tmp_path / "page.html").read_text()
    (settings,) = [section for section in report.page.sections if section.anchor == "settings"]
    assert [[value.text for value in row] for row in settings.tables[0].rows] == [["atp.freeze_at", "0.6", "0.3"]]


def test_two_runs_of_one_recipe_and_one_seed_stand_apart(tmp_path):
    records = runs(tmp_path, folders.metrics(), folders.metrics(), settings=dict.fromkeys((0, 1), folders.recipe()))
    assert [(variant.name, len(variant.records)) for variant in group(records)] == [("a", 1), ("b", 1)]


def test_learning_rates_of_a_comparison_are_not_seeds(tmp_path):
    slower = row("atp", 0.4, 0, 2.6) | {"name": "atp-0.4-lr0.001-seed0", "learning_rate": 1e-3}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*ROWS, slower]))
    variants = {variant.name: variant for variant in group(read_sources([tmp_path])[0])}
    assert len(variants["atp 40 %"].records) == 2
    (alone,) = variants["atp 40 %, learning rate 0.001"].records
    assert alone.metrics["learning_rate"] == 1e-3


def test_a_comparison_is_shown_by_strategy_and_sparsity(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    records, failed = read_sources([tmp_path])
    report = write_comparison(records, tmp_path / "page.html", None, failed)
    assert len(report.table.rows) == len({(row["strategy"], row["sparsity"]) for row in ROWS if row["status"] == "ok"})
    page = (tmp_path / "page.html").read_text()
    for text in (
        "When should I prune?",
        "killed by SIGKILL",
        "prune-then-tune:magnitude 40 %",
        "perplexity against parameters",
    ):
        assert text in page
    assert "unknown" in report.page.warnings[0]


def test_figures_read_well():
    assert [short(v) for v in (None, float("nan"), 0.5519, 134_515_008, 2.5e9, 9_999, 12_345)] == [
        *("-", "NaN", "0.5519", "134.5M", "2.5G", "9,999", "12.35k")
    ]
    assert compared("x", 90.0, 100.0, True).verdict == "better"
    assert compared("x", 100.0, 100.0, True).change == "same"
    assert compared("x", float("nan"), 100.0, True).change == ""
    assert compared("x", 3000.0, 100.0, True).change == "30x"
    assert moved("x", 0.4, 0.5, False).verdict == "worse"


@pytest.mark.parametrize(
    ("lower", "metrics"),
    [
        (
            False,
            ("acc", "rougeL", "macro_f1", "answer_f1", "power", "after", "gloss", "chrf", "exact_match,error-free"),
        ),
        (True, ("word_perplexity", "nll", "eval_loss", "bits_per_byte", "brier_score", "ter", "WER", "rmse,none")),
    ],
)
def test_whole_words_of_a_metric_say_which_way_is_better(lower, metrics):
    assert {metric: lower_is_better(metric) for metric in metrics} == dict.fromkeys(metrics, lower)
