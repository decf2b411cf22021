"""`journal.jsonl`, which a run writes while it trains -> what happened, by step.

A line is a JSON object of `step` and one of `run`, `log`, `kept`, `held_out`, `alert`. A killed run leaves a cut last
line, which does not count; other lines that cannot be read are counted and left out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        """Steps at which a logged scalar was NaN or infinite."""
        return [s for s, v in self.logs if number(v.get(name)) is not None and finite(v.get(name)) is None]

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
    unreadable = 0
    for text in _whole_lines(path.read_bytes()):
        step, name, content = _line(text, ("run", *lines))
        if step is None:
            unreadable += 1
        elif name == "run":
            run = content
        else:
            lines[name].append((step, content))
    found = {name: tuple(sorted(each, key=lambda line: line[0])) for name, each in lines.items()}
    return Journal(run, found["log"], found["kept"], found["held_out"], found["alert"], unreadable)


def _whole_lines(content: bytes) -> list[bytes]:
    """All lines, the last one only if it is whole: it ends, or it can be read."""
    head, _, last = content.rpartition(b"\n")
    lines = [line for line in head.split(b"\n") if line.strip()]
    return [*lines, last] if last.strip() and _parsed(last) is not None else lines


def _line(text: bytes, names: tuple[str, ...]) -> tuple[int | None, str, Mapping[str, Any]]:
    parsed = _parsed(text)
    step = finite(parsed.get("step")) if isinstance(parsed, dict) else None
    for name in names if step is not None else ():
        if isinstance(parsed, dict) and name in parsed:
            return int(step or 0), name, mapping_at(parsed, name)
    return None, "", {}


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
