"""The shell: `atp train | recover | export | eval | generate | inspect | plan | compare | report | history | bench`.

Exit status 0 on success; 1 where a comparison has a failed run; 2 on bad input, with one line on standard error that
says what is wrong and what to do.
"""

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub.utils import logging as hub_logging

from atp.commands import (
    bench,
    compare,
    evaluate,
    export,
    generate,
    history,
    inspect,
    plan,
    recover,
    report,
    train,
)
from atp.errors import ATPError, ConfigError


class _Parser(argparse.ArgumentParser):
    """Says in one line, through `ConfigError`, what argparse says in several."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = _Parser(prog="atp", description="All-in-one LoRA tuning and structural pruning of causal language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, recover, export, evaluate, generate, inspect, plan, compare, report, history, bench):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    hub_logging.set_verbosity_error()  # its retries would bury the one line that says what is wrong
    try:
        arguments, overrides = build_parser().parse_known_args(argv)
        if overrides and not getattr(arguments, "takes_overrides", False):
            raise ConfigError(f"unrecognized arguments: {' '.join(overrides)} (see atp --help)")
        for option in ("json", "csv"):
            if (file := getattr(arguments, option, None)) and not Path(file).parent.is_dir():
                raise ConfigError(f"--{option} {file}: its folder does not exist: make it first")
        arguments.overrides, arguments.words = overrides, list(sys.argv[1:] if argv is None else argv)
        return arguments.run(arguments) or 0
    except ATPError as error:
        return _refuse(error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _refuse(f"{error.filename or 'output'}: the disk is full: free some space, then run again with --resume")


def _refuse(reason: object) -> int:
    print(f"atp: {' '.join(str(reason).split())}", file=sys.stderr)
    return 2
