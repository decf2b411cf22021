"""Writing a run's journal (`atp.journal`) while it trains.

Nothing saved depends on it: where it cannot be written, one warning says so and training goes on.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.errors import CheckpointError, in_one_line
from atp.files import file_written_beside
from atp.journal import JOURNAL, read_lines

logger = logging.getLogger(__name__)


class Journal:
    """Appends to the journal in `folder`.

    Args:
        writes: whether this process does; in the others nothing happens.
    """

    def __init__(self, folder: Path, writes: bool) -> None:
        self._file = folder / JOURNAL
        self._writes = writes

    def begin(self, step: int) -> list[dict[str, Any]]:
        """Leave in it what there was up to `step`, where a run is resumed, or nothing.

        Returns:
            What is left.
        """
        if not self._writes:
            return []
        kept = self._up_to(step) if step > 0 else []
        try:
            with file_written_beside(self._file) as beside:
                beside.write_text("".join(map(_line, kept)), encoding="utf-8")
        except CheckpointError as error:
            self._give_up(error)
        return kept

    def write(self, step: int, kind: str, content: Mapping[str, Any]) -> None:
        """Add one line."""
        if not self._writes:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, kind: content}))
        except OSError as error:
            self._give_up(error)

    def _up_to(self, step: int) -> list[dict[str, Any]]:
        try:
            return [entry for entry in read_lines(self._file)[0] if entry["step"] <= step]
        except OSError:
            return []

    def _give_up(self, error: Exception) -> None:
        self._writes = False
        logger.warning("atp: %s is not written from here on: %s", self._file, in_one_line(error))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
