"""Saved state: tensors as safetensors, the rest as JSON, in one folder that is complete or absent."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp.errors import CheckpointError
from atp.files import written_beside

FOLDER = "atp"
TENSORS, VALUES = "state.safetensors", "state.json"


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `folder` anew.

    Raises:
        CheckpointError: where the disk refuses; nothing half-written stays.
    """
    with written_beside(folder) as beside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside / TENSORS)
        (beside / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: where it is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no saved pruning state here: {_elsewhere(folder)}")
    try:
        return load_file(folder / TENSORS), json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: damaged ({error}): {_elsewhere(folder)}") from error


def _elsewhere(folder: Path) -> str:
    """What to do instead: the newest checkpoint beside this one that is complete."""
    checkpoint = folder.parent
    siblings = checkpoint.parent.glob("checkpoint-*") if checkpoint.parent.is_dir() else ()
    complete = [c for c in siblings if c != checkpoint and (c / FOLDER / VALUES).is_file()]
    if not complete:
        return "start the run anew"
    newest = max(complete, key=lambda c: int(c.name.rsplit("-", 1)[-1]))
    return f"resume from {newest}"
