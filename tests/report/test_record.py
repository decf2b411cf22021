"""Reading what runs leave behind. Oracles: the lines as they were written, and what was done to the files."""

import json

import pytest

from atp.errors import DataError
from atp.journal import JOURNAL
from atp.report.journal import read_journal
from atp.report.record import read_run
from atp.report.sources import read_sources
from atp.training.journal import Journal
from tests.report import folders
from tests.report.rows import ROWS, failed


def test_a_journal_is_read_as_it_was_written(tmp_path):
    lines = [*folders.journal(logged=5), folders.ALERT]
    folder = folders.run(tmp_path / "run", lines)
    journal = read_journal(folder / "journal.jsonl")
    assert journal.run == lines[0]["run"]
    assert journal.series("loss") == [
        (line["step"], line["log"]["loss"]) for line in lines if "loss" in line.get("log", {})
    ]
    assert journal.kept == tuple((line["step"], line["kept"]) for line in lines if "kept" in line)
    assert journal.alerts == ((230, folders.ALERT["alert"]),)
    assert journal.measured("dense")[0] == (0, 3.31)
    assert (journal.last_step, journal.unreadable) == (50, 0)


@pytest.mark.parametrize("cut", [b'{"step": 90, "lo', b'{"step": 90, "log": {"loss": 1.0}}', b"\xff\xfe"])
def test_a_cut_last_line_is_no_damage(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"step": 10, "log": {"loss": 2.0}}\n' + cut)
    journal = read_journal(path)
    whole = cut.endswith(b"}}")
    assert journal.series("loss") == [(10, 2.0), *([(90, 1.0)] if whole else [])]
    assert journal.unreadable == 0


def test_lines_without_sense_are_counted_and_nan_is_no_value(tmp_path):
    path = tmp_path / "journal.jsonl"
    bad = ["[]", "null", "{}", '{"step": "x", "log": {}}', '{"step": 1, "unknown": 2}', "{{{", "[" * 100_000]
    good = ['{"step": 1, "log": {"loss": NaN}}', '{"step": 2, "log": null}', '{"step": 3, "log": {"loss": 1e999}}']
    path.write_text("\n".join([*bad, *good]) + "\n")
    journal = read_journal(path)
    assert journal.unreadable == len(bad)
    assert journal.series("loss") == []
    assert journal.not_finite("loss") == [1, 3]


def test_losses_that_are_not_finite_are_found_in_what_training_writes(tmp_path):
    writer = Journal(tmp_path, writes=True)
    for step, loss in enumerate((2.0, float("nan"), float("inf"), 1.5)):
        writer.write(step, "log", {"loss": loss})
    writer.write(4, "log", {"eval_loss": 2.0})
    writer.write(4, "log", {"loss": "of another type"})
    journal = read_journal(tmp_path / JOURNAL)
    assert journal.not_finite("loss") == [1, 2]
    assert journal.series("loss") == [(0, 2.0), (3, 1.5)]


def test_a_crashed_run_tells_what_is_missing(tmp_path):
    record = read_run(folders.run(tmp_path / "run", measured=False))
    assert not record.finished
    assert [note.split()[0] for note in record.notes] == ["metrics.json"]
    assert record.parameters == pytest.approx(134_515_008 - 106_168_320 * 0.4)
    assert record.sparsity == 0.4


@pytest.mark.parametrize("garbage", ["", "{", "[1, 2]", "\x00\x01", "[" * 100_000])
def test_garbage_is_said_and_left_out(tmp_path, garbage):
    folder = folders.run(tmp_path / "run")
    for name in ("metrics.json", "recipe.yaml"):
        (folder / name).write_text(garbage)
    record = read_run(folder)
    assert (record.metrics, record.recipe) == ({}, {})
    assert len([note for note in record.notes if note.startswith(("metrics.json", "recipe.yaml"))]) == 2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds none of metrics\.json, journal\.jsonl and recipe\.yaml"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("atp", "strategy"),
    [
        ({"decision": "criterion", "init": "flap", "freeze_at": 0.0}, "prune-then-tune:flap"),
        ({"decision": "criterion", "init": "magnitude", "freeze_at": 1.0}, "tune-then-prune:magnitude"),
        ({"decision": "logits"}, "logits"),
        ({}, "atp"),
    ],
)
def test_the_recipe_names_the_strategy(tmp_path, atp, strategy):
    assert read_run(folders.run(tmp_path / "run", settings=folders.recipe(**atp))).strategy == strategy


def test_sources_are_folders_comparisons_and_evaluations(tmp_path):
    folders.run(tmp_path / "a" / "run")
    folders.run(tmp_path / "b" / "run")
    (tmp_path / "compare").mkdir()
    rows = [*ROWS, ROWS[0] | {"validation": {"nll": 1.0, "perplexity": 2.7}}, failed("atp", 0.9, 0)]
    (tmp_path / "compare" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"name": "cu')
    records, bad = read_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert ([record.name for record in records], bad) == (["a/run", "b/run"], [])
    records, bad = read_sources([tmp_path / "compare"])
    assert len(records) == len([row for row in ROWS if row["status"] == "ok"])
    assert records[0].perplexity == 2.7  # the last row of a name counts
    assert [row["name"] for row in bad] == [ROWS[-1]["name"], "atp-0.9-0"]
    evaluated = {"model": "x/y", "parameters": 5, "perplexity": 3.0, "nll": 1.1, "tasks": {"qa": folders.task(0.5)}}
    (tmp_path / "eval.json").write_text(json.dumps({"models": [evaluated], "versions": {"torch": "2"}}))
    ((record,), _) = read_sources([tmp_path / "eval.json"])
    assert (record.name, record.parameters, record.perplexity) == ("x/y", 5, 3.0)
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(DataError, match="is no run"):
        read_sources([tmp_path / "empty.json"])
