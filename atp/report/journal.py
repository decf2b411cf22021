"""A run's journal (`atp.journal`) -> what happened, by step. Lines that make no sense are counted and left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atp.journal import read_lines
from atp.report.values import finite, mapping_at, number

Series = list[tuple[int, float]]
"""Steps and values."""


@dataclass(frozen=True)
class Journal:
    """What a run wrote while it trained, by optimizer step.

    `run`: the line that describes it. `logs`: scalars as the Trainer logged them. `kept`: per kind of group, how many
    are kept in each set. `unreadable`: how many lines made no sense.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    logs: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    kept: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    held_out: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    alerts: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    unreadable: int = 0

    @property
    def last_step(self) -> int | None:
        """The last step that left anything."""
        return max((line[0] for lines in (self.logs, self.kept, self.held_out) for line in lines), default=None)

    def series(self, name: str) -> Series:
        """The finite values of a logged scalar."""
        return [(step, value) for step, values in self.logs if (value := finite(values.get(name))) is not None]

    def measured(self, name: str) -> Series:
        """The finite values of `dense` or `pruned` on held-out rows, in nats per token."""
        return [(step, value) for step, values in self.held_out if (value := finite(values.get(name))) is not None]

    def not_finite(self, name: str) -> list[int]:
        """Steps at which a logged scalar was NaN or infinite: null, and in older journals the value itself."""
        return [step for step, values in self.logs if name in values and _is_not_finite(values[name])]

    def scalars(self, prefix: str) -> list[str]:
        """Names of the logged scalars that start with `prefix`, in the order in which they appear."""
        names = {name: None for _, values in self.logs for name in values if name.startswith(prefix)}
        return [name for name in names if self.series(name)]


def read_journal(path: Path) -> Journal:
    """Read what can be read.

    Raises:
        OSError: where the file cannot be opened.
    """
    run: Mapping[str, Any] = {}
    lines: dict[str, list[tuple[int, Mapping[str, Any]]]] = {"log": [], "kept": [], "held_out": [], "alert": []}
    entries, unreadable = read_lines(path)
    for entry in entries:
        name = next((name for name in ("run", *lines) if name in entry), None)
        if name is None:
            unreadable += 1
        elif name == "run":
            run = mapping_at(entry, name)
        else:
            lines[name].append((entry["step"], mapping_at(entry, name)))
    found = {name: tuple(sorted(each, key=lambda line: line[0])) for name, each in lines.items()}
    return Journal(run, found["log"], found["kept"], found["held_out"], found["alert"], unreadable)


def _is_not_finite(value: Any) -> bool:
    return value is None or (number(value) is not None and finite(value) is None)
