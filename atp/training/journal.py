"""A run's journal: `journal.jsonl` in its output folder, one JSON object a line, written while it trains.

Every line has `step`, the optimizer step, and one of:

run        what there is to prune and when: `sizes` (groups of every set) and `blocks` (its block's number, or null), by
           kind, `total_steps`, `start_step`, `freeze_step`, `sparsity`, `space`, `parameters`, `prunable_parameters`
log        the Trainer's log as it was: loss, learning_rate, eval_loss, and our figures under `atp/`
kept       groups that every set keeps, by kind, in the order of `sizes`
held_out   log-perplexity (nats a token) on the same `rows`: `dense` with nothing pruned, `pruned` as decided by then
alert      `name`, `message`, `value`

A number that is not finite is null. A line may be cut where a run was killed. Nothing saved depends on this file: where
it cannot be written, one warning says so and training goes on.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.errors import CheckpointError, in_one_line
from atp.files import file_written_beside

JOURNAL = "journal.jsonl"

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
        kept = [entry for entry in entries(self._file) if entry["step"] <= step] if step > 0 else []
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

    def _give_up(self, error: Exception) -> None:
        self._writes = False
        logger.warning("atp: %s is not written from here on: %s", self._file, in_one_line(error))


def entries(file: Path) -> list[dict[str, Any]]:
    """Lines of a journal that can be read, in order; none where there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_finite(entry), default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
