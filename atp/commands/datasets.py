"""A recipe's data: read, checked, tokenised."""

import re
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from atp.data import Row, TaskRow, check_disjoint, fingerprint, make_windows, read_rows, read_task, windows_fingerprint
from atp.evaluation import check_tasks_available
from atp.recipe import DataSettings
from atp.subset import evenly_spread

MEASURED = "validation_windows"
"""What fingerprints call the windows to measure, which differ where tokenizers do."""

_SAMPLES = 3
_PROMPT_WORDS, _REFERENCE_WORDS = 24, 60


@dataclass(frozen=True)
class RunData:
    """Tokenised windows; `validation` holds the ones to measure, `tasks` the rows to score, by task.

    Attributes:
        samples: held-out rows that models continue, `completion` being how the text goes on.
        fingerprints: of every set's rows, by name, and of the windows to measure.
        rows: how many every set has.
    """

    train: Dataset
    validation: Dataset | None
    calibration: Dataset | None
    tasks: dict[str, list[TaskRow]]
    samples: tuple[Row, ...]
    fingerprints: dict[str, str]
    rows: dict[str, int]


def load_data(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, progress: bool) -> RunData:
    """Read, check that nothing held out is learned from, and tokenise.

    Raises:
        DataError: where a file is missing or malformed, or sets share rows.
        ConfigError: where there are tasks, and nothing to score them with.
    """

    def rows(sources: str | list[str] | None, split: str) -> list[Row] | None:
        return read_rows(sources, split, settings.prompt, settings.completion) if sources else None

    train = rows(settings.train, settings.train_split) or []
    validation = rows(settings.validation, settings.validation_split)
    calibration = rows(settings.calibration, settings.calibration_split)
    tasks = {name: read_task(path) for name, path in settings.tasks.items()}
    if tasks:
        check_tasks_available()
    check_disjoint(train, validation or [], ("training", "validation"))
    check_disjoint(calibration or [], validation or [], ("calibration", "validation"))
    for name, task in tasks.items():
        check_disjoint(train, task, ("training", name))
        check_disjoint(calibration or [], task, ("calibration", name))
        tasks[name] = [task[i] for i in evenly_spread(len(task), settings.task_rows)]

    def windows(found: list[Row] | None) -> Dataset | None:
        if found is None:
            return None
        return make_windows(found, tokenizer, settings.max_length, settings.packing, settings.completion_only, progress)

    measured = windows(validation)
    if measured is not None:
        measured = measured.select(evenly_spread(len(measured), settings.validation_windows))
    named = {"train": train, "validation": validation, "calibration": calibration}
    sets = {name: found for name, found in named.items() if found} | {f"tasks/{n}": t for n, t in tasks.items()}
    prints = {name: fingerprint(found) for name, found in sets.items()}
    counts = {name: len(found) for name, found in sets.items()}
    if measured is not None:
        prints[MEASURED], counts[MEASURED] = windows_fingerprint(measured), len(measured)
    return RunData(
        windows(train),
        measured,
        windows(calibration),
        tasks,
        samples=_samples(validation or []),
        fingerprints=prints,
        rows=counts,
    )


def _samples(rows: list[Row]) -> tuple[Row, ...]:
    """A few rows with text, evenly spread; of plain text the beginning becomes the prompt."""
    written = [row for row in rows if not row.blank]
    chosen = [written[index] for index in evenly_spread(len(written), _SAMPLES)]
    return tuple(row if row.prompt.strip() else _split(row.completion) for row in chosen)


def _split(text: str) -> Row:
    words = re.findall(r"\s*\S+", text)
    return Row("".join(words[:_PROMPT_WORDS]), "".join(words[_PROMPT_WORDS : _PROMPT_WORDS + _REFERENCE_WORDS]))
