"""A run's journal: `journal.jsonl` in its output folder, one JSON object a line, written while it trains.

Every line has `step`, the optimizer step, and one of:

run        what there is to prune and when: `sizes` (groups of every set) and `blocks` (its block's number, or null), by
           kind, `total_steps`, `start_step`, `freeze_step`, `sparsity`, `space`, `parameters`, `prunable_parameters`
log        the Trainer's log as it was: loss, learning_rate, eval_loss, and our figures under `atp/`
kept       groups that every set keeps, by kind, in the order of `sizes`
held_out   log-perplexity (nats a token) on the same `rows`: `dense` with nothing pruned, `pruned` as decided by then
alert      `name`, `message`, `value`

A number that is not finite is null. A line may be cut where a run was killed.
"""

import json
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
_STEPS = 1 << 63


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines that can be read and have a step, in order, and how many others there are.

    A last line that is cut, as a killed run leaves it, is neither.

    Raises:
        OSError: where the file cannot be opened.
    """
    head, _, last = path.read_bytes().rpartition(b"\n")
    parsed = [_parsed(line) for line in head.split(b"\n") if line.strip()]
    if (end := _parsed(last)) is not None:
        parsed.append(end)
    found = [entry | {"step": int(entry["step"])} for entry in parsed if _is_entry(entry)]
    return found, len(parsed) - len(found)


def _is_entry(value: Any) -> bool:
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int | float) and not isinstance(step, bool) and abs(step) < _STEPS


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
