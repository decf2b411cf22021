"""The folder of an unfinished recovery, beside what it will write: whether it is this one's, and its end."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.errors import CheckpointError
from atp.files import write_json
from atp.recovery.streams import STREAMS

_SETTINGS = "settings.json"


def work_folder(out: Path) -> Path:
    """Where an interrupted recovery that was to write `out` left what it had done."""
    return out.with_name(f".{out.name}.unfinished")


def check(work: Path, about: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
    """Before anything is loaded: see that what lies in `work` may go, or is of the same recovery.

    Args:
        about: plain values that tell one recovery from another.

    Raises:
        CheckpointError: where something lies there and nothing says what to do, or it is another recovery's.
    """
    file = work / _SETTINGS
    if work.exists() and not (resume or overwrite):
        raise CheckpointError(f"{work} holds an interrupted recovery: give --resume to go on, or --overwrite")
    if resume and file.is_file():
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key, value in about.items() if earlier.get(key) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): give --overwrite to start again") from None
        if changed:
            raise CheckpointError(
                f"{work} was left with another {', '.join(changed)}: use the same, or --overwrite to start again"
            )


def begin(work: Path, about: Mapping[str, Any], resume: bool) -> None:
    """Go on in `work`, which has been checked, or make it anew."""
    file = work / _SETTINGS
    if resume and file.is_file():
        for stream in work.glob(f"{STREAMS}*"):  # of a process that was killed
            shutil.rmtree(stream, ignore_errors=True)
        return
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{work} cannot be made: {error.strerror}: give another --out") from None
    write_json(file, about)
