"""The shell: `atp train`, `compare`, `export` and the others of `COMMANDS`.

Exit status 0 on success; 1 where a comparison has a failed run or a gate of `eval` fails; 2 on bad input and 130 on
Ctrl-C, with one line on standard error that says what is wrong and what to do.
"""

import argparse
import errno
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from atp.errors import ATPError, ConfigError
from atp.files import STREAMS, check_place

COMMANDS = {
    "train": ("train", "tune and prune by a recipe"),
    "recover": ("recover", "fit a pruned model's blocks to the dense tuned model's, where that helps"),
    "export": ("export", "write the pruned model of a finished run"),
    "eval": ("evaluate", "quality, speed and size of one or more models, and gates for regressions"),
    "generate": ("generate", "write calibration data with the model itself"),
    "rotate": ("rotate", "order the value dimensions of a model, for space `values`"),
    "inspect": ("inspect", "what can be pruned in a model, and what a sparsity would leave"),
    "plan": ("plan", "memory of each GPU and time of a step, from a model's shapes"),
    "compare": ("compare", "one recipe under several strategies of when and by what to prune"),
    "report": ("report", "one page of a run, or of several side by side"),
    "history": ("history", "the runs in a folder, their headline numbers and settings that differ"),
    "bench": ("bench", "speed before and after pruning, on random weights of a model's shapes"),
}
"""Name of a command -> its module in `atp.commands`, imported when it is asked for, and its line in the help."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the signal's number."""

_TORCH_CANNOT_WRITE = ("unexpected pos", "iostream error")
"""What `torch.save` says, in no `OSError`, where the disk has taken less than it was given."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Parser(argparse.ArgumentParser):
    """Says in one line, through `ConfigError`, what argparse says in several."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """All commands, and the arguments of the one that `words` ask for."""
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = _Parser(prog="atp", description="All-in-one LoRA tuning and structural pruning of causal language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == asked:
            importlib.import_module(f"atp.commands.{module}").add(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal's alphabet lacks
    arguments = argparse.Namespace()
    try:
        parser = build_parser(words)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
        # peft 0.21 asks transformers by the old name: nothing that a user of a command could mend
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        arguments, overrides = parser.parse_known_args(words)
        if overrides and not getattr(arguments, "takes_overrides", False):
            raise ConfigError(f"unrecognized arguments: {' '.join(overrides)} (see atp --help)")
        for option in ("json", "csv"):
            if file := getattr(arguments, option, None):
                _check_place(option, Path(file))
        launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if launched and not getattr(arguments, "takes_processes", False):
            raise ConfigError(f"atp {words[0]} runs in one process: start it without a launcher")
        arguments.overrides, arguments.words = overrides, words
        return arguments.run(arguments) or 0
    except ATPError as error:
        return _refuse(error)
    except OSError as error:
        if error.errno in _FULL:
            return _refuse(_full_disk(error.filename or "output", arguments))
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}: check the path, and that it may be read and written")
    except RuntimeError as error:
        if not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        return _refuse(_full_disk("a checkpoint", arguments))
    except KeyboardInterrupt:
        resumable = f": run the same again{_resuming(arguments)} to go on from what it has saved"
        return _refuse(f"interrupted{resumable if hasattr(arguments, 'resume') else ''}", INTERRUPTED)


def _at_home(word: str) -> str:
    """`~/x` and `--option=~/x` written out; a shell leaves the second as it is."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def _full_disk(name: str, arguments: argparse.Namespace) -> str:
    again = f"again{_resuming(arguments)}" if hasattr(arguments, "resume") else "the same again"
    return f"{name}: the disk is full: free some space, then run {again}"


def _resuming(arguments: argparse.Namespace) -> str:
    return " with --resume" + (" in place of --overwrite" if getattr(arguments, "overwrite", False) else "")


def _check_place(option: str, file: Path) -> None:
    """Before the work whose results `file` is to hold."""
    if not os.path.isdir(file.parent):
        raise ConfigError(f"--{option} {file}: its folder does not exist: make it first")
    if os.path.isdir(file):
        raise ConfigError(f"--{option} {file}: is a folder: name a file in it")
    if str(file) not in STREAMS and (os.path.isfile(file) or not os.path.exists(file)):  # else it is written itself
        check_place(file.resolve().parent)


def _refuse(reason: object, status: int = 2) -> int:
    print(f"atp: {' '.join(str(reason).split())}", file=sys.stderr)
    return status
