"""A recipe's data: read, checked, tokenised."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from atp.data import Row, TaskRow, check_disjoint, make_windows, read_rows, read_task
from atp.evaluation import check_tasks_available, evenly_spread
from atp.recipe import DataSettings


@dataclass(frozen=True)
class RunData:
    """Tokenised windows; `validation` holds the ones to measure, `tasks` the rows to score, by task."""

    train: Dataset
    validation: Dataset | None
    calibration: Dataset | None
    tasks: dict[str, list[TaskRow]]


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
    return RunData(windows(train), measured, windows(calibration), tasks)
