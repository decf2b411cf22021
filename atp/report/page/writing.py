"""Writing a page: whole or not at all, and with what it says returned as plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.files import file_written_beside
from atp.report.page.parts import Page, Table
from atp.report.page.regressions import same_data
from atp.report.page.rendering import render
from atp.report.page.single import run_page
from atp.report.page.versus import comparison_page
from atp.report.record import Record, read_run

REPORT = "report.html"


@dataclass(frozen=True)
class Report:
    """A page that was written. `regressions`: of a comparison, what is worse than the baseline, and whether all
    were measured on the same data, `None` where that is not known.
    """

    path: Path
    page: Page
    regressions: tuple[str, ...] = ()
    same_data: bool | None = None

    @property
    def table(self) -> Table | None:
        """The headline table, where anything was measured."""
        return next((table for section in self.page.sections[:1] for table in section.tables), None)

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        table = self.table
        rows = (
            [dict(zip(table.columns, (value.plain for value in row), strict=True)) for row in table.rows]
            if table
            else []
        )
        return {
            "report": str(self.path),
            "same_data": self.same_data,
            "summary": self.page.summary,
            "warnings": list(self.page.warnings),
            "headline": rows,
            "regressions": list(self.regressions),
        }


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Report:
    """The page of what is in a run's folder, finished or not; beside it, as `report.html`, unless `out` is given.

    Raises:
        DataError: where the folder holds nothing of a run.
        CheckpointError: where the page cannot be written; nothing is changed then.
    """
    return write_record(read_run(Path(run_dir)), Path(out) if out else Path(run_dir) / REPORT)


def write_record(record: Record, out: Path) -> Report:
    """As `write_report`, of a run that was read already."""
    page = run_page(record)
    _write(page, out)
    return Report(out, page)


def write_comparison(
    records: Sequence[Record], out: Path, baseline: str | None = None, failed: Sequence[Mapping[str, Any]] = ()
) -> Report:
    """The page of several runs.

    Args:
        baseline: name of the run that the others are measured against; the first, unless given.
        failed: rows of runs that did not end well.

    Raises:
        ConfigError: where no run has that name.
        CheckpointError: as `write_report`.
    """
    page, regressions = comparison_page(records, baseline, failed)
    _write(page, out)
    return Report(out, page, regressions, same_data(records))


def _write(page: Page, out: Path) -> None:
    with file_written_beside(out) as fresh:
        fresh.write_text(render(page), encoding="utf-8")
