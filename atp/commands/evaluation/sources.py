"""What `--tasks` names: local files, folders of them, and tasks of lm-evaluation-harness.

A file called test or validation is known by its folder: `data/pubmedqa/test.jsonl` is the task `pubmedqa`. Of a folder
that has such files, or whose sub-folders have, those are the tasks (test before validation), else all its files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.data import TaskRow, read_task
from atp.errors import ConfigError, DataError
from atp.evaluation import (
    NamedTask,
    TaskScore,
    check_tasks_available,
    load_named,
    score_named,
    score_task,
)
from atp.evaluation.metrics import METRICS
from atp.subset import evenly_spread

_SUFFIXES = (".jsonl", ".json", ".ndjson")
_SPLITS = ("test", "validation")
_GIVEN_NAME = re.compile(r"([^\s=/]+)=(.+)")


@dataclass(frozen=True)
class Tasks:
    """Rows of local tasks, by name, and tasks of the harness."""

    local: dict[str, list[TaskRow]]
    named: list[NamedTask]

    @property
    def metrics(self) -> dict[str, tuple[str, ...]]:
        """Names of the metrics of each task."""
        own = {name: tuple(METRICS[rows[0].kind]) for name, rows in self.local.items()}
        return own | {task.name: task.metrics for task in self.named}

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, rows: int | None = None
    ) -> dict[str, TaskScore]:
        """Of `model` on all of them, by name.

        Args:
            rows: only as many of each of the harness's, evenly spread; local ones are what they are.
        """
        found = {name: score_task(name, task, model, tokenizer, batch_size) for name, task in self.local.items()}
        return found | (score_named(self.named, model, tokenizer, batch_size, rows) if self.named else {})


def find_tasks(words: Sequence[str], rows: int | None = None, include_path: str | None = None) -> Tasks:
    """Read all rows, and load the harness's tasks.

    Args:
        rows: only as many of each local task, evenly spread.
        include_path: a folder of the harness's YAML task definitions.

    Raises:
        DataError: where a file is missing, empty or malformed.
        ConfigError: where a name is unknown or taken twice, or lm-eval not installed.
    """
    if words:
        check_tasks_available()
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder: check the path")
    files: dict[str, Path] = {}
    named = []
    for word in words:
        found = list(_files(word))
        if not found:
            named.append(word)
        for name, path in found:
            if name in files:
                raise ConfigError(f"--tasks: {path} and {files[name]} are both called {name!r}: give NAME={path}")
            files[name] = path
    if taken := [name for name in named if name in files]:
        raise ConfigError(f"--tasks: {files[taken[0]]} has the name of lm-eval's {taken[0]!r}: give NAME=FILE")
    local = {name: read_task(str(path)) for name, path in files.items()}
    spread = {name: [task[i] for i in evenly_spread(len(task), rows)] for name, task in local.items()}
    return Tasks(spread, load_named(named, include_path) if named else [])


def task_files(words: Sequence[str]) -> list[Path]:
    """The files that `--tasks` names."""
    return [path for word in words for _, path in _files(word)]


def _files(word: str) -> Iterator[tuple[str, Path]]:
    """Name and path of each file that a word means; none where it is a name of the harness."""
    given = _GIVEN_NAME.fullmatch(word)
    if given and given[2].endswith(_SUFFIXES):
        yield given[1], Path(given[2])
    elif word.endswith(_SUFFIXES):
        yield _name(Path(word)), Path(word)
    elif Path(word).is_dir():
        found = [file for folder in (Path(word), *sorted(Path(word).iterdir())) for file in _held_out(folder)]
        found = found or sorted(file for file in Path(word).iterdir() if file.suffix in _SUFFIXES)
        if not found:
            raise DataError(f"--tasks {word}: the folder holds no {', '.join(_SUFFIXES)} file: check the path")
        for file in found:
            yield _name(file), file
    elif "/" in word or word.startswith("."):
        raise DataError(f"--tasks {word}: no such file or folder: check the path")


def _held_out(folder: Path) -> list[Path]:
    found = (folder / f"{split}{suffix}" for split in _SPLITS for suffix in _SUFFIXES)
    return [file for file in found if file.is_file()][:1]


def _name(file: Path) -> str:
    folder = file.resolve().parent.name
    return folder if file.stem in _SPLITS and folder else file.stem.replace(" ", "-")
