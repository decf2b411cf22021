"""Folders and files that are complete or absent: written beside their place, then renamed into it."""

import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from atp.errors import ATPError, CheckpointError, ConfigError, in_one_line

STREAMS = {"/dev/stdout": "stdout", "/dev/stderr": "stderr"}
"""Names of what is open already, and may be a file: to be gone on with, not replaced."""


def keep_apart(out: Path, *read: Path) -> None:
    """Refuse an `out` that is, or holds, something that is read: it would be replaced.

    Raises:
        ConfigError: naming both.
    """
    for source in read:
        if os.path.exists(source) and source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"{out} is or holds {source}, which would be replaced: choose another name")


def check_place(folder: Path) -> None:
    """Before the work whose results `folder` is to hold: see that it can be made and written.

    Raises:
        ConfigError: where it cannot.
    """
    if os.path.islink(folder) and not os.path.exists(folder):
        raise ConfigError(f"{folder} is a link to {os.readlink(folder)}, which is not there: choose another place")
    try:
        folder.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ConfigError(f"{folder}: {error.strerror}: choose another place") from None
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise ConfigError(f"{folder}: {there} is a file, no folder: choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: nothing can be written to {there}: choose another place")


@contextmanager
def alone_in(folder: Path, command: str, option: str) -> Iterator[None]:
    """No other `command` writes to `folder` meanwhile; one that was killed holds nothing.

    The folder is made where it is not there, and goes again where nothing is written to it. Where the file system has
    no locks, nobody is kept out.

    Args:
        option: of the command, which names the folder.

    Raises:
        ConfigError: where another does, or the folder cannot be written.
    """
    check_place(folder)
    made = _not_there(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another {command} is running in {folder}: wait for it, or give another {option}") from None
    except (NotImplementedError, OSError):  # no locks here
        pass
    try:
        yield
    finally:
        with suppress(OSError):  # not there, or somebody else's
            (folder / ".lock").unlink()
        lock.release()
        _remove_empty(made)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link, but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that takes its place when the block ends well, and vanishes when it does not, with
    all folders that were made for it.

    Raises:
        CheckpointError: for any `OSError` inside the block or while renaming.
    """
    place = out.resolve()
    fresh = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    aside = place.with_name(f".{place.name}.{os.getpid()}.old")
    made = _not_there(place.parent)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if place.exists():
            place.rename(aside)
        _take_place(fresh, place, aside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} could not be written ({in_one_line(error)}): nothing was changed; free some space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _remove_empty(made)


def begun_beside(out: Path) -> list[Path]:
    """What a kill left of writing `out` beside itself."""
    return sorted(out.parent.glob(f".{out.name}.*.tmp"))


@contextmanager
def file_written_beside(out: Path) -> Iterator[Path]:
    """A path beside `out` for a fresh file, which takes its place when the block ends well, else vanishes.

    Raises:
        CheckpointError: for any `OSError` inside the block or while renaming.
    """
    place = out.resolve()
    fresh = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        fresh.replace(place)
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


def write_json(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as indented JSON, whole or not at all."""
    write_text(path, json.dumps(results, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file or none: beside it first, then rename. What a link points to is written, and a device.

    Raises:
        ATPError: where the folder is missing or the disk refuses.
    """
    target, place = Path(path), Path(path).resolve()
    try:
        if name := STREAMS.get(str(path)):
            _write_to_stream(getattr(sys, name), content)
            return
        if target.exists() and not target.is_file():  # such as /dev/null
            target.write_bytes(content)
            return
        descriptor, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        do = "check that its folder exists" if isinstance(error, FileNotFoundError) else "choose another place"
        raise ATPError(f"{target}: cannot be written: {error.strerror}: {do}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, place)
    except OSError as error:
        Path(beside).unlink(missing_ok=True)
        raise ATPError(f"{target}: cannot be written: {error.strerror}: free space or choose another path") from None


def _not_there(folder: Path) -> list[Path]:
    """Of a folder and those that hold it, which have yet to be made; the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something is in it, or it was never made
            folder.rmdir()


def _write_to_stream(stream: TextIO, content: bytes) -> None:
    """What a stream has not written yet, then `content`."""
    stream.flush()
    try:
        descriptor = os.dup(stream.fileno())
    except io.UnsupportedOperation:  # one that is captured
        stream.write(content.decode("utf-8"))
        return
    with open(descriptor, "wb") as file:
        file.write(content)


def _take_place(fresh: Path, out: Path, aside: Path) -> None:
    try:
        fresh.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    with suppress(OSError):
        remove(aside)
