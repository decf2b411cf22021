"""Folders and files that are complete or absent: written beside their place, then renamed into it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from atp.errors import CheckpointError, in_one_line


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: for any `OSError` inside the block or while renaming.
    """
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if out.exists():
            out.rename(aside)
        _take_place(fresh, out, aside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} could not be written ({in_one_line(error)}): nothing was changed; free some space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def file_written_beside(out: Path) -> Iterator[Path]:
    """A path beside `out` for a fresh file, which takes its place when the block ends well, else vanishes.

    Raises:
        CheckpointError: for any `OSError` inside the block or while renaming.
    """
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        fresh.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written ({in_one_line(error)}): nothing was changed; free some space or choose "
            "another place"
        ) from error
    finally:
        with suppress(OSError):
            fresh.unlink()


def written_by_one(out: Path, writes: bool) -> AbstractContextManager[Path | None]:
    """`written_beside` in the process that `writes`; the others, which help it, get no folder."""
    return written_beside(out) if writes else nullcontext()


def _take_place(fresh: Path, out: Path, aside: Path) -> None:
    try:
        fresh.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
