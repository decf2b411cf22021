"""Saved state: tensors as safetensors, the rest as JSON, in one folder that is complete or absent.

Everything is written into a folder beside the final one and renamed at the end; a crash or a full disk leaves what
was there before.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp.errors import CheckpointError

FOLDER = "atp"
TENSORS, VALUES = "state.safetensors", "state.json"


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `folder` anew.

    Raises:
        CheckpointError: where the disk refuses; nothing half-written stays.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside / TENSORS)
        (beside / VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")
        replace_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written ({error}): free some space and resume") from error


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


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` in the place of `target`, which need not exist; the old one goes last."""
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _elsewhere(folder: Path) -> str:
    """What to do instead: the newest checkpoint beside this one that is complete."""
    checkpoint = folder.parent
    siblings = checkpoint.parent.glob("checkpoint-*") if checkpoint.parent.is_dir() else ()
    complete = [c for c in siblings if c != checkpoint and (c / FOLDER / VALUES).is_file()]
    if not complete:
        return "start the run anew"
    newest = max(complete, key=lambda c: int(c.name.rsplit("-", 1)[-1]))
    return f"resume from {newest}"
