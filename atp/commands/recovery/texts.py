"""The texts of a recovery: what is fitted to, what decides, and what is looked at, as windows of ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atp.data import Row, TaskRow, check_disjoint, fingerprint, make_windows, read_rows
from atp.errors import ConfigError
from atp.recipe import DataSettings
from atp.recovery import Texts
from atp.recovery.texts import CALIBRATION, HELD_OUT, OTHER
from atp.subset import evenly_spread


@dataclass(frozen=True)
class Text:
    """Where it is from, its rows, and windows of ids, `(windows, tokens)`."""

    sources: Sequence[str]
    rows: Sequence[Row]
    ids: Tensor

    def about(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sources": list(self.sources),
            "windows": len(self.ids),
            "tokens": self.ids.numel(),
            "fingerprint": fingerprint(self.rows),
        }


@dataclass(frozen=True)
class Size:
    """Tokens a window, windows of calibration text, and of every other."""

    length: int
    windows: int
    held_out_windows: int

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("held_out_windows", 1), ("length", 2)):
            if (given := getattr(self, name)) < least:
                option = f"--{name.replace('_', '-')} {given}"
                raise ConfigError(f"{option} is not allowed: it must be an integer >= {least}")


def read_texts(
    files: Mapping[str, Sequence[str]],
    recipe: DataSettings | None,
    tasks: Mapping[str, Sequence[TaskRow]],
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
) -> dict[str, Text]:
    """Every text that there is, by name.

    Args:
        files: by name, which may be none: then calibration and held-out text are the recipe's.
        tasks: rows that are scored.

    Raises:
        ConfigError: where nothing says what to fit to or what decides.
        DataError: where calibration text shares a row with another text or a task, or a file is malformed.
    """
    found = {name: _read(name, files[name], recipe) for name in (CALIBRATION, HELD_OUT, OTHER)}
    given = {name: text for name, text in found.items() if text is not None}
    fitted_to = given[CALIBRATION][1]
    for name in (HELD_OUT, OTHER):
        if name in given:
            check_disjoint(fitted_to, given[name][1], (CALIBRATION, name.replace("_", "-")))
    for name, task in tasks.items():
        check_disjoint(fitted_to, task, (CALIBRATION, name))
    texts = {}
    for name, (sources, rows) in given.items():
        windows = make_windows(rows, tokenizer, size.length)
        most = size.windows if name == CALIBRATION else size.held_out_windows
        chosen = windows.select(evenly_spread(len(windows), most))
        texts[name] = Text(sources, rows, torch.tensor(chosen["input_ids"][:]))
    return texts


def as_windows(texts: Mapping[str, Text]) -> Texts:
    """What recovery takes."""
    other = texts[OTHER].ids if OTHER in texts else None
    return Texts(texts[CALIBRATION].ids, texts[HELD_OUT].ids, other)


def _read(name: str, files: Sequence[str], recipe: DataSettings | None) -> tuple[Sequence[str], list[Row]] | None:
    if files:
        return files, read_rows(files)
    if name == OTHER:
        return None
    sources: str | list[str] | None = None
    split = ""
    if recipe is not None and name == CALIBRATION:
        sources, split = recipe.train, recipe.train_split
    elif recipe is not None:
        sources, split = recipe.validation, recipe.validation_split
    if not sources or recipe is None:
        option = "--data" if name == CALIBRATION else "--held-out"
        raise ConfigError(f"the run has no recipe that names {name.replace('_', '-')} text: give {option} FILE.jsonl")
    rows = read_rows(sources, split, recipe.prompt, recipe.completion)
    return [sources] if isinstance(sources, str) else sources, rows
