"""The journal. Oracle: JSON lines, read by `json` itself."""

import json
import logging

from atp.journal import JOURNAL
from atp.training.journal import Journal


def lines(folder):
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


def written(folder, steps):
    journal = Journal(folder, writes=True)
    journal.begin(0)
    for step in steps:
        journal.write(step, "log", {"loss": float(step)})
    return journal


def test_numbers_that_are_not_finite_are_null(tmp_path):
    written(tmp_path, ()).write(3, "log", {"loss": float("nan"), "other": [float("inf"), 1.0], "name": "a"})
    assert lines(tmp_path) == [{"step": 3, "log": {"loss": None, "other": [None, 1.0], "name": "a"}}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    written(tmp_path, range(1, 6))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"step": 6, "log": {"lo')
    kept = Journal(tmp_path, writes=True).begin(3)
    assert [entry["step"] for entry in lines(tmp_path)] == [entry["step"] for entry in kept] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL]


def test_a_new_run_begins_a_new_one(tmp_path):
    written(tmp_path, range(3))
    written(tmp_path, [7])
    assert [entry["step"] for entry in lines(tmp_path)] == [7]


def test_other_processes_write_nothing(tmp_path):
    journal = Journal(tmp_path, writes=False)
    journal.begin(0)
    journal.write(1, "log", {})
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_be_written_training_goes_on_and_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "run", writes=True)
    with caplog.at_level(logging.WARNING):
        journal.begin(0)
        journal.write(1, "log", {})
        journal.write(2, "log", {})
    assert len(caplog.messages) == 1
    assert "is not written from here on" in caplog.messages[0]


def test_a_resumed_run_without_one_begins_it(tmp_path):
    assert Journal(tmp_path, writes=True).begin(3) == []
    assert lines(tmp_path) == []
