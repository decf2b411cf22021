"""What `atp compare` leaves and prints: results.md, results.json, plots, a table per sparsity, and the answers."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atp.commands.output import print_table
from atp.files import write_bytes, write_json, write_text
from atp.report import (
    Cell,
    PlotsUnavailableError,
    answers,
    by_sparsity,
    markdown,
    printed_table,
    size_plot,
    sparsity_plot,
    summarise,
)
from atp.strategies import DENSE

_WIDTH = 100
_PLOTS: dict[str, Callable[[Sequence[Cell]], bytes]] = {
    "perplexity_by_sparsity.png": sparsity_plot,
    "perplexity_by_size.png": size_plot,
}


def report(out: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write results.md, results.json and the plots into `out`, and print the summary; the content of results.json."""
    cells = summarise(rows)
    failed = [row for row in rows if row["status"] == "failed"]
    plots = _write_plots(out, cells)
    write_text(out / "results.md", markdown(cells, failed, plots))
    results = {
        "summary": [dataclasses.asdict(cell) for cell in cells],
        "answers": answers(cells),
        "failed": [{key: row[key] for key in ("name", "exit_status", "error")} for row in failed],
        "versions": next((row["versions"] for row in rows if row["status"] == "ok"), None),
    }
    write_json(out / "results.json", results)
    _print(cells)
    for row in failed:
        print(f"failed: {row['name']}: exit status {row['exit_status']}: {row['error']}")
    print(f"\nwritten: {', '.join(str(out / name) for name in ('results.md', 'results.json', *plots))}")
    return results


def _write_plots(out: Path, cells: Sequence[Cell]) -> list[str]:
    """Names of the images written; none without matplotlib, which is said in one line."""
    if all(cell.sparsity is None for cell in cells):
        return []
    try:
        images = {name: draw(cells) for name, draw in _PLOTS.items()}
    except PlotsUnavailableError as error:
        print(f"no plots: {error}")
        return []
    for name, image in images.items():
        write_bytes(out / name, image)
    return list(images)


def _print(cells: Sequence[Cell]) -> None:
    """A table per sparsity, dense on top of each, then the answers."""
    for sparsity, here in by_sparsity(cells):
        print()
        title = "dense" if sparsity is None else f"{sparsity * 100:.4g} % removed"
        print_table(title, *printed_table(here), width=_WIDTH)
    for question, answer in answers(cells).items():
        print(textwrap.fill(f"{question} {answer}", _WIDTH, subsequent_indent="  "))
    if all(cell.strategy != DENSE for cell in cells):
        print("gap closed and the ratios to dense need dense rows: add dense to --strategies")
