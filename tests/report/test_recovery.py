"""What the page says of recovery. Oracles: the figures that went in, and the errors' means taken by hand."""

import json
import statistics

import pytest

from atp.report import write_comparison, write_report
from atp.report.page.block_errors import error_charts, read_blocks
from atp.report.page.recovery import recoveries_section, recovery_section
from atp.report.record import read_run
from tests.report import folders
from tests.report.test_page import HOSTILE, Reader, page_of, without_charts

WHOLE = folders.recovery()


def told(section):
    """The one table, by row."""
    (table,) = section.tables
    return {row[0].text: [value.plain for value in row[1:]] for row in table.rows}


def test_one_sentence_says_what_was_done_and_that_it_was_kept():
    assert recovery_section(WHOLE).intro.startswith(
        "Recovery by br+gp of runs/medical/pruned with runs/medical as its teacher on 16,384 tokens of "
        "data/pubmedqa/train.jsonl: the result was kept; block by block, 28 of 30 were kept. "
    )


def test_a_result_that_was_rolled_back_is_said_twice():
    section = recovery_section(folders.recovery(kept=False))
    assert "the result was rolled back" in section.intro
    assert section.tables[0].note == "Rolled back: the model is as it was before."
    assert recovery_section(WHOLE).tables[0].note == ""


def test_quality_before_and_after_on_both_texts():
    rows = told(recovery_section(WHOLE))
    assert rows["held-out text, perplexity"] == ["24.05", "20.49 (-14.8 %)"]
    assert rows["other text, KL from the teacher, nats per token"] == ["0.558", "0.306 (-45.2 %)"]
    assert len(rows) == 6
    assert len(told(recovery_section(folders.recovery(other=False)))) == 3


def test_scores_on_tasks_before_and_after():
    tasks = {
        "before": {"pubmedqa": {"metric": "acc", "value": 0.53}, "cases": {"metric": "perplexity", "value": 20.0}},
        "after": {"pubmedqa": {"metric": "acc", "value": 0.5}, "cases": {"metric": "perplexity", "value": 19.0}},
    }
    rows = recovery_section(WHOLE | {"tasks": tasks}).tables[0].rows
    (accuracy, perplexity) = (
        [value for row in rows if row[0].text == name for value in row]
        for name in ("pubmedqa, acc", "cases, perplexity")
    )
    assert (accuracy[1].text, accuracy[2].plain, accuracy[2].verdict) == ("0.53", "0.5 (-0.030)", "worse")
    assert perplexity[2].verdict == "better"
    assert recovery_section(WHOLE | {"tasks": {"before": {"x": 3}, "after": []}}).tables[0].rows


def test_errors_and_gaps_are_those_of_the_blocks():
    blocks = read_blocks(WHOLE)
    errors, gaps = error_charts(blocks)
    before = [each["before"]["held_out"]["relative"] for each in WHOLE["blocks"]]
    after = [each["after"] for each in WHOLE["blocks"]]
    gap = [each["held_out"]["relative"] / each["calibration"]["relative"] - 1 for each in after]
    assert f"held-out, before: {statistics.fmean(before) * 100:.3g} % on average" in errors.alt
    assert f"after: {statistics.fmean(gap) * 100:.3g} % on average" in gaps.alt
    assert errors.note.endswith("Blocks rolled back: 3, 17.")
    assert errors.table.columns[:3] == ("block", "calibration, before", "calibration, after")
    assert [row[0].text for row in errors.table.rows] == [str(n) for n in range(30)]
    assert errors.table.rows[3][-2].text == "no"


def test_the_page_has_the_section_where_a_run_was_recovered_only(tmp_path, monkeypatch):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    recovered = page_of(folders.run(tmp_path / "recovered", False, False, recovered=WHOLE))
    assert '<section id="recovery"' in recovered
    assert "Gap: held-out over calibration error</figcaption>" in recovered
    charts = [svg["aria-label"] for svg in Reader(recovered).all("svg")]
    assert sum("Lines of" in alt for alt in charts) == 2
    assert "block 29, held-out, after: " in recovered
    without_charts(monkeypatch)
    assert "recovery" not in page_of(folders.run(tmp_path / "plain"))


def test_runs_side_by_side_say_what_recovery_made_of_each():
    recoveries = {"a": WHOLE, "b": {}, "c": folders.recovery(kept=False), "d": {"method": "lr"}}
    (table,) = recoveries_section(recoveries).tables
    before, after = (WHOLE["overall"][time]["held_out"]["perplexity"] for time in ("before", "after"))
    figures = [f"{before:.4g}", f"{after:.4g} (-{(1 - after / before) * 100:.1f} %)"]
    assert [[value.plain for value in row] for row in table.rows] == [
        ["a", "br+gp", "kept", "28 of 30", *figures],
        ["c", "br+gp", "rolled back", "28 of 30", *figures],
        ["d", "lr", "-", "-", "-", "-"],
    ]
    assert recoveries_section({"b": {}}).is_empty


def test_a_page_of_several_runs_has_the_section_where_one_was_recovered(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    recovered, *plain = (
        read_run(folders.run(tmp_path / name, False, recovered=made))
        for name, made in zip("abc", (WHOLE, None, None), strict=True)
    )
    for records, wanted in (([recovered, plain[0]], True), (plain, False)):
        write_comparison(records, tmp_path / "page.html")
        assert ("What recovery made of pruned models" in (tmp_path / "page.html").read_text()) == wanted


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\x00", "[" * 100_000, '{"settings": ' + "[" * 600 + "]" * 600 + "}"]
)
def test_a_damaged_file_is_said_or_left_out(tmp_path, monkeypatch, text):
    without_charts(monkeypatch)
    folder = folders.run(tmp_path / "run", recovered={})
    (folder / "recovered" / "recovery.json").write_text(text)
    notes = read_run(folder).notes
    assert len(notes) == (0 if text.startswith("{") and len(text) > 1 else 1)
    assert all(note.startswith("recovery.json") and note.endswith("cannot be shown") for note in notes)
    assert write_report(folder).path.is_file()


NONSENSE = [None, 3, True, "text", [], [[]], {}, {"a": {"b": 1}}, [None, 3, {}], float("nan"), 1e308, -1, 10**400]


@pytest.mark.parametrize("wrong", NONSENSE)
def test_no_value_of_another_type_breaks_the_page(tmp_path, wrong):
    numbers = {"error": wrong, "relative": wrong}
    block = {"block": wrong, "before": {"calibration": numbers, "held_out": numbers}, "after": wrong, "kept": wrong}
    near = {"block": 1, "before": {"calibration": {"relative": 1e-308}, "held_out": {"relative": 1e308}}}
    texts = {"held_out": {"nll": wrong, "perplexity": wrong, "kl": wrong}, "other": wrong}
    for recovery in (
        dict.fromkeys(WHOLE, wrong),
        WHOLE | {"blocks": [block, near, wrong], "overall": {"before": texts, "after": texts, "kept": wrong}},
        WHOLE | {"data": {"calibration": {"sources": wrong, "tokens": wrong}}, "seconds": wrong},
    ):
        page_of(folders.run(tmp_path / "run", False, False, recovered=recovery))


@pytest.mark.parametrize("left", ["method", "data", "blocks", "overall"])
def test_what_there_is_is_shown(left):
    section = recovery_section({left: WHOLE[left]})
    assert not section.is_empty
    assert section.intro.startswith("Recovery")
    assert len(section.charts) == (2 if left == "blocks" else 0)


def test_one_block_and_one_text_make_a_chart():
    (chart,) = error_charts(read_blocks({"blocks": [{"block": 4, "after": {"held_out": {"relative": 0.5}}}]}))
    assert "held-out, after: 50 % on average" in chart.alt
    assert len(chart.table.rows) == 1


def test_hostile_names_stay_text(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    recovery = WHOLE | {"method": HOSTILE, "student": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    read = Reader(page_of(folders.run(tmp_path / "run", recovered=recovery)))
    assert len(read.all("script")) == 1
    assert not read.all("img")
    assert json.dumps(HOSTILE) in " ".join(read.texts)
