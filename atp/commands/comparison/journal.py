"""The journal of a comparison: one JSON object a line, each written at once and in full.

A process that is killed while it writes leaves a cut last line, which the next reader drops.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from atp.errors import CheckpointError
from atp.files import write_text


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of every name. A cut last line is removed from the file.

    Raises:
        CheckpointError: where another line is not a row.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), start=1) if line]
    return {row["name"]: row for row in rows}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, and return when the disk has it."""
    with path.open("ab") as file:
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def replace_journal(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file anew, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"name", "strategy", "sparsity", "seed", "status"} <= row.keys():
        raise CheckpointError(f"{where}: is not a row of a comparison: remove the line, then run again")
    return row
