"""`atp report RUN...`: one self-contained page of a run, or of several side by side."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from atp.commands.output import print_table
from atp.errors import ConfigError
from atp.files import write_json
from atp.report.page import REPORT, Report, write_comparison, write_record
from atp.report.page.parts import Value
from atp.report.record import Record
from atp.report.sources import read_sources

_WIDTH = 100
_PRINTED = ("run", "parameters", "prompt, ms", "decode, ms per token", "perplexity")
"""Columns of a comparison that a terminal has room for; the page has all of them."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="the output_dir of a run, finished or not; the folder of an atp compare; a file of atp eval --json",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"the page (default: {REPORT} in the run's folder; of several runs, in the folder that holds them all)",
    )
    parser.add_argument("--baseline", metavar="RUN", help="what the others are measured against (default: the first)")
    parser.add_argument("--json", metavar="FILE", help="write the headline table and the regressions here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and print where it is and its headline table."""
    paths = [Path(name) for name in arguments.runs]
    baseline = arguments.baseline
    records, failed = read_sources([*paths, *_unless_named(baseline, paths)])
    out = Path(arguments.out) if arguments.out else _place(paths)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give the name of a file in it, e.g. {out / REPORT}")
    if len(records) == 1 and not failed:
        if baseline is not None:
            raise ConfigError(f"--baseline {baseline}: {records[0].name} is the only run: give one to compare with it")
        report = write_record(records[0], out)
    else:
        report = write_comparison(records, out, _name(baseline, records), failed)
    print_report(report)
    if arguments.json:
        write_json(arguments.json, report.as_values())


def _unless_named(baseline: str | None, paths: Sequence[Path]) -> list[Path]:
    """The baseline's folder, where it is one and not among the runs."""
    if baseline is None or not Path(baseline).exists():
        return []
    return [] if any(path.resolve() == Path(baseline).resolve() for path in paths) else [Path(baseline)]


def _name(baseline: str | None, records: Sequence[Record]) -> str | None:
    """The name of the run that `--baseline` means, which may be a path of one or a name on the page."""
    if baseline is None or not Path(baseline).exists():
        return baseline
    meant = [record.name for record in records if record.source and record.source.resolve() == Path(baseline).resolve()]
    return meant[0] if len(meant) == 1 else baseline


def _place(paths: Sequence[Path]) -> Path:
    """In the folder of a single source, else in the folder that holds all of them."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    if len(folders) == 1:
        return folders[0] / REPORT
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders])) / REPORT


def print_report(report: Report) -> None:
    """Its headline table, what is to be said of it, and where it is."""
    if table := report.table:
        shown = [i for i, title in enumerate(table.columns) if not table.wide or title in _PRINTED]
        rows = [[_text(row[i]) for i in shown] for row in table.rows]
        print_table(report.page.title, [table.columns[i].replace(", ", ",\n") for i in shown], rows, width=_WIDTH)
    for warning in report.page.warnings:
        print(f"note: {warning}")
    for regression in report.regressions:
        print(f"worse: {regression}")
    print(f"written: {report.path}")


def _text(value: Value) -> str:
    return "\n".join(part for part in (value.text, value.detail, value.change) if part)
