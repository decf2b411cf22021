"""What commands print and write: tables on standard output, results as JSON, every file written beside and renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from atp.errors import ATPError


def write_text(path: str | Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file or none: beside it first, then rename.

    Raises:
        ATPError: where the folder is missing or the disk refuses.
    """
    target = Path(path)
    try:
        descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ATPError(f"{target}: cannot be written: {error.strerror}: check that its folder exists") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise ATPError(f"{target}: cannot be written: {error.strerror}: free space or choose another path") from None


def write_json(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as indented JSON, whole or not at all."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> None:
    """A table on standard output, the first column to the left and the others to the right.

    Args:
        width: columns of text where the output is no terminal, or a wider one.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False) if width else Table()
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=bool(width and index)
        )
    for row in rows:
        table.add_row(*(show(cell) for cell in row))
    console = Console(width=_at_most(width)) if width else Console()
    console.print(title, soft_wrap=True, markup=False, highlight=False)
    console.print(table)


def _at_most(width: int) -> int:
    return min(width, shutil.get_terminal_size((width, 24)).columns)


def show(value: object) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
