"""Saved state: tensors as safetensors, the rest as JSON, in one folder that is complete or absent."""

import json
import logging
import sys
import zipfile
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atp.errors import CheckpointError
from atp.files import begun_beside, written_by_one
from atp.structure.sample import is_another
from atp.structure.sharding import shape_of, whole
from atp.weights import write_weights

FOLDER = "atp"
TENSORS, VALUES = "state.safetensors", "state.json"
BASE = "base"
"""In a saved state: numbers of the base model that it belongs to."""

logger = logging.getLogger(__name__)

_WRITTEN_LAST = "trainer_state.json"


def save_state(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], writes: bool = True) -> None:
    """Write `folder` anew. Collective where tensors are in parts over processes: one exists whole at a time.

    Args:
        writes: False where another process writes, and this one brings its parts.

    Raises:
        CheckpointError: where the disk refuses; nothing half-written stays.
    """
    plan = {k: torch.empty(shape_of(v), dtype=v.dtype, device="meta") for k, v in tensors.items()}
    with written_by_one(folder, writes) as beside:
        write_weights(beside, plan, lambda name: whole(tensors[name]), sys.maxsize, Path(TENSORS).stem)
        if beside is not None:
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
    """Refuse state that another run saved: another base model, configuration, number of processes, or of steps.

    Args:
        saved, mine: `BASE` (`structure.sample`), `config` (plain values), `world_size` and `total_steps`, as saved and
            as they are now.
    """
    if is_another(saved.get(BASE), mine[BASE]):
        raise CheckpointError(f"{folder}: was saved beside another base model, of other weights: use the same")
    changed = [
        f"{key}: {saved['config'].get(key)} -> {value}"
        for key, value in mine["config"].items()
        if key not in ("export", "on_alert") and value != saved["config"].get(key)
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


def set_aside_unfinished(output_dir: Path, each_machine: bool = False, plain: bool = False) -> list[Path]:
    """Rename checkpoints that were being written when their run was killed, so that nothing goes on from them; say so.

    Their state of ours is written first; the Trainer's `trainer_state.json` last, but for the random states of other
    processes than the first. Checkpoints without such a state are not touched, unless `plain`.

    Args:
        each_machine: whether each has a folder of its own (`save_on_each_node`), with random states of its processes.
        plain: whether adapters that nothing was pruned beside are such checkpoints too.

    Returns:
        What they are called now.
    """
    aside = []
    for checkpoint in sorted(output_dir.glob("checkpoint-*")):
        state = checkpoint / FOLDER
        ours = state.is_dir() or begun_beside(state) or (plain and (checkpoint / "adapter_config.json").exists())
        if ours and not _is_finished(checkpoint, each_machine):
            names = (f"_unfinished-{checkpoint.name}{end}" for end in chain([""], map("-{}".format, count(2))))
            free = (path for name in names if not (path := checkpoint.with_name(name)).exists())
            aside.append(checkpoint.rename(next(free)))
            logger.warning("atp: its run was killed before it was complete: now called %s", aside[-1])
    return aside


def not_finished_yet(checkpoint: Path) -> None:
    """To be called before a checkpoint is written where an earlier run may have left one."""
    (checkpoint / _WRITTEN_LAST).unlink(missing_ok=True)


def _is_finished(checkpoint: Path, each_machine: bool = False) -> bool:
    try:
        json.loads((checkpoint / _WRITTEN_LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    try:
        processes = json.loads((checkpoint / FOLDER / VALUES).read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError):
        return True  # of which `load_state` says more
    if processes == 1 or not any(checkpoint.glob("rng_state_*.pth")):  # the latter: `save_only_model`
        return True
    expected = [checkpoint / f"rng_state_{rank}.pth" for rank in range(processes)]
    return all(zipfile.is_zipfile(file) for file in expected if file.exists() or not each_machine)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _elsewhere(folder: Path) -> str:
    """What to do instead: the newest checkpoint beside this one that is complete."""
    checkpoint = folder.parent
    siblings = checkpoint.parent.glob("checkpoint-*") if checkpoint.parent.is_dir() else ()
    complete = [c for c in siblings if c != checkpoint and (c / FOLDER / VALUES).is_file() and _is_finished(c)]
    if not complete:
        return "start the run anew"
    newest = max(complete, key=lambda c: int(c.name.rsplit("-", 1)[-1]))
    return f"resume from {newest}"
