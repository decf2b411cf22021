"""`atp report` and `atp history`, in this process. Oracles: exit status, files left, folders made by hand."""

import json
import os
import re
import sys
import time

import pytest

from atp.cli import main
from tests.report import folders
from tests.report.rows import ROWS
from tests.test_cli import refused


@pytest.fixture(autouse=True)
def _without_charts(monkeypatch):
    """Charts are looked at elsewhere."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    monkeypatch.setenv("COLUMNS", "80")


def upto(step):
    """The journal of a run that was cut."""
    return [line for line in folders.journal() if line["step"] <= step]


@pytest.fixture
def root(tmp_path):
    """A finished run, one that was cut an hour ago, one that goes on, and a checkpoint that is none."""
    now = time.time()
    folders.run(tmp_path / "a", settings=folders.recipe(sparsity=0.2))
    folders.run(tmp_path / "deep" / "b", upto(240), False)
    folders.run(tmp_path / "c", upto(120), False)
    folders.run(tmp_path / "a" / "checkpoint-10")
    for name, age in (("a", 7200), ("deep/b", 3600), ("c", 1)):
        for path in (tmp_path / name).glob("*.*"):
            os.utime(path, (now - age, now - age))
    return tmp_path


def test_report_writes_beside_the_run_and_prints_the_headline(root, capsys):
    assert main(["report", str(root / "a"), "--json", str(root / "page.json")]) == 0
    printed = capsys.readouterr().out
    assert f"written: {root / 'a' / 'report.html'}" in printed
    assert "134.5M" in printed
    assert (root / "a" / "report.html").is_file()
    assert json.loads((root / "page.json").read_text())["report"] == str(root / "a" / "report.html")


def test_report_of_several_takes_a_baseline_by_path_and_says_what_is_worse(root, capsys):
    folders.run(root / "d", measured=folders.metrics(perplexity=40.0, fingerprint="ffff"))
    assert main(["report", str(root / "d"), "--baseline", str(root / "a"), "--json", str(root / "page.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"worse: d: perplexity 40 against 24\.1", printed)
    assert "measured on different data" in printed
    assert max(len(line) for line in printed.splitlines() if not line.startswith(("note", "worse", "written"))) <= 80
    found = json.loads((root / "page.json").read_text())
    assert found["same_data"] is False
    assert [row["run"] for row in found["headline"]] == ["a (baseline)", "d"]


def test_report_of_a_comparison_lies_in_its_folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["report", str(tmp_path), "--baseline", "dense"]) == 0
    assert "Quality against size and speed" in (tmp_path / "report.html").read_text()


def test_a_baseline_by_path_beside_a_comparison_is_that_run(root, capsys):
    comparison = root / "comparison"
    comparison.mkdir()
    (comparison / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    page = root / "page.json"
    for runs in ((comparison, root / "a"), (comparison,)):
        assert main(["report", *map(str, runs), "--baseline", str(root / "a"), "--json", str(page)]) == 0
        named = [row["run"] for row in json.loads(page.read_text())["headline"]]
        assert [name for name in named if name.endswith("(baseline)")] == ["a (baseline)"]
    assert "is none of the runs" in refused(capsys, "report", root / "a", comparison, "--baseline", comparison)


def test_report_refuses_what_is_no_run(root, capsys):
    assert "holds none of" in refused(capsys, "report", root)
    assert "there is no such folder" in refused(capsys, "report", root / "nowhere")
    assert "is none of the runs" in refused(capsys, "report", root / "a", root / "c", "--baseline", "x")
    for baseline in ("x", root / "a"):
        line = refused(capsys, "report", root / "a", "--baseline", baseline)
        assert f"--baseline {baseline}: a is the only run" in line
    assert "is a folder" in refused(capsys, "report", root / "a", "--out", root)
    assert not list(root.rglob("*.html"))


def test_history_lists_runs_newest_last_with_what_sets_them_apart(root, capsys):
    assert main(["history", str(root), "--json", str(root / "history.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((root / "history.json").read_text())
    assert [(each["run"], each["state"]) for each in found["runs"]] == [
        *(("a", "finished"), ("deep/b", "stopped 240/400"), ("c", "running 120/400"))
    ]
    assert found["runs"][0]["perplexity"] == 24.1
    assert found["runs"][0]["tasks"]["pubmedqa"] == {"metric": "acc", "value": 0.552}
    assert found["settings_that_differ"] == {"atp.sparsity": {"0.2": ["a"], "0.4": ["deep/b", "c"]}}
    assert "atp.sparsity: 0.2 (1), 0.4 (2, 3)" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 80


def test_history_of_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert "holds metrics.json or journal.jsonl" in refused(capsys, "history", tmp_path)
    assert "there is no such folder" in refused(capsys, "history", tmp_path / "nowhere")
