"""What commands print: tables on standard output, and numbers as people read them."""

import shutil
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


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
    console = Console(width=_at_most(width) if width else None, markup=False, emoji=False)
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)


def _at_most(width: int) -> int:
    return min(width, shutil.get_terminal_size((width, 24)).columns)


def show(value: object) -> str:
    """A number as people read it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
