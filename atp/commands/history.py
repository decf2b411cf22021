"""`atp history DIR`: the runs in a folder, the newest last, with their headline numbers and what sets them apart."""

import argparse
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from atp.commands.output import print_table
from atp.errors import DataError
from atp.files import write_json
from atp.journal import JOURNAL
from atp.report.page.tasks import scores
from atp.report.page.texts import short
from atp.report.page.versus import differences
from atp.report.record import METRICS, Record, read_run
from atp.report.values import number_at

_WIDTH = 80
_ALIVE_SECONDS = 600
"""A run without results that wrote something more recently is taken to be running."""
_PARTS = ("checkpoint-*", "final", "pruned")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="searched with all folders in it")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a table of runs, the scores, and the settings in which they differ."""
    root = Path(arguments.folder)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder: give one that holds runs")
    found = sorted(((read_run(folder), folder) for folder in _runs(root)), key=lambda each: each[0].when or 0.0)
    if not found:
        raise DataError(f"{root}: no folder in it holds {METRICS} or {JOURNAL}: give one that holds runs of atp train")
    records = {str(number): record for number, (record, _) in enumerate(found, start=1)}
    names = [str(folder.relative_to(root)) if folder != root else folder.resolve().name for _, folder in found]
    differing = differences({number: record for number, record in records.items() if record.recipe})
    _print(root, records, names, differing)
    if arguments.json:
        runs = [
            _values(record, name, folder)
            for record, name, (_, folder) in zip(records.values(), names, found, strict=True)
        ]
        by_name = {
            setting: {value: [names[int(number) - 1] for number in who] for value, who in values.items()}
            for setting, values in differing.items()
        }
        write_json(arguments.json, {"runs": runs, "settings_that_differ": by_name})


def _runs(root: Path) -> Iterator[Path]:
    """Folders of runs, the parts of runs left out."""
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not any(Path(name).match(part) for part in _PARTS))
        if METRICS in files or JOURNAL in files:
            yield Path(folder)


def _state(record: Record) -> str:
    """`finished`, `running`, or how far it came."""
    if record.finished:
        return "finished"
    step, total = record.journal.last_step, number_at(record.journal.run, "total_steps")
    reached = "" if step is None else f" {step:,}" + (f"/{total:,.0f}" if total else "")
    alive = record.when is not None and time.time() - record.when < _ALIVE_SECONDS
    return ("running" if alive else "stopped") + reached


def _print(
    root: Path, records: Mapping[str, Record], names: Sequence[str], differing: Mapping[str, Mapping[str, list[str]]]
) -> None:
    rows = [
        (
            f"{number} {name}",
            _when(record),
            _state(record),
            "-" if record.sparsity is None else f"{record.sparsity * 100:.4g} %",
            short(record.parameters),
            short(record.perplexity),
        )
        for (number, record), name in zip(records.items(), names, strict=True)
    ]
    print_table(f"{root}: {len(records)} run(s)", ("run", "when", "state", "sparsity", "params", "ppl"), rows, _WIDTH)
    for number, record in records.items():
        if found := scores(record.metrics):
            _fold(f"{number}:", ", ".join(f"{s.task} {s.metric} {s.text}" for s in found.values()))
    if differing:
        print("\nSettings that differ, as value (runs):")
    for setting, values in differing.items():
        _fold(f"{setting}:", ", ".join(f"{value[:60]} ({', '.join(who)})" for value, who in values.items()))


def _fold(head: str, text: str) -> None:
    print(textwrap.fill(f"{head} {text}", _WIDTH, initial_indent="  ", subsequent_indent="    "))


def _when(record: Record) -> str:
    return "-" if record.when is None else datetime.fromtimestamp(record.when).strftime("%Y-%m-%d %H:%M")


def _values(record: Record, name: str, folder: Path) -> dict[str, Any]:
    return {
        "run": name,
        "folder": str(folder),
        "when": None if record.when is None else datetime.fromtimestamp(record.when).astimezone().isoformat(),
        "state": _state(record),
        "strategy": record.strategy,
        "sparsity": record.sparsity,
        "parameters": record.parameters,
        "perplexity": record.perplexity,
        "tasks": {task: {"metric": s.metric, "value": s.value} for task, s in scores(record.metrics).items()},
        "notes": list(record.notes),
    }
