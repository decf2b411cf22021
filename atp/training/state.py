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


def check_same_run(folder: Path, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse state that another run saved: another configuration, number of processes, or number of steps.

    Args:
        saved, mine: `config` (plain values), `world_size` and `total_steps`, as saved and as they are now.
    """
    changed = [
        f"{key}: {saved['config'].get(key)} -> {value}"
        for key, value in mine["config"].items()
        if key != "export" and value != saved["config"].get(key)
    ]
    if changed:
        raise CheckpointError(f"{folder}: was saved with another ATPConfig ({'; '.join(changed)}): use the same")
    if saved["world_size"] != mine["world_size"]:
        raise CheckpointError(
            f"{folder}: was saved by {saved['world_size']} processes, this run has {mine['world_size']}: use as many"
        )
    if saved["total_steps"] != mine["total_steps"]:
        raise CheckpointError(
            f"{folder}: was saved in a run of {saved['total_steps']} steps, this one has {mine['total_steps']}: "
            "resume with the same number of steps, or start anew"
        )


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _elsewhere(folder: Path) -> str:
    """What to do instead: the newest checkpoint beside this one that is complete."""
    checkpoint = folder.parent
    siblings = checkpoint.parent.glob("checkpoint-*") if checkpoint.parent.is_dir() else ()
    complete = [c for c in siblings if c != checkpoint and (c / FOLDER / VALUES).is_file()]
    if not complete:
        return "start the run anew"
    newest = max(complete, key=lambda c: int(c.name.rsplit("-", 1)[-1]))
    return f"resume from {newest}"
