"""`accelerate launch` without its imports, which take each process of each launch 10 to 15 s.

One process imports all there is; launchers are its forks, and ranks are theirs. Everything else is accelerate's and
torchrun's own: configuration files, environments, rendezvous, watching over processes and what they say at the end.
"""

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate.commands import launch
from torch.distributed import run as torchrun

from atp import cli
from tests import in_parts, processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bitsandbytes", "deepspeed", __name__])

TIMEOUT = 300
"""Seconds."""

MODULES = {"tests.processes": processes.main, "tests.in_parts": in_parts.main, "atp": cli.main}
"""What may be launched -> what `python -m` would call."""


def launched(
    launcher: Sequence[str], module: str, words: Sequence[str], environment: dict[str, str], output: Path
) -> int:
    """Exit status of `accelerate launch LAUNCHER... -m MODULE WORDS...`; of one process, without a launcher.

    Args:
        output: file that takes what is printed, errors too.

    Raises:
        TimeoutError: after `TIMEOUT`, when launcher and ranks are ended.
    """
    process = FORKS.Process(target=_launch, args=(list(launcher), module, list(words), environment, output))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.terminate()  # not killed: the launcher ends its ranks
        raise TimeoutError(f"no end after {TIMEOUT} s: {output.read_text()[-3000:]}")
    return process.exitcode


def _launch(launcher: list[str], module: str, words: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _compile_nothing()
    if not launcher:
        MODULES[module](words)
        return
    configured = torchrun.config_from_args

    def forked(args: argparse.Namespace) -> tuple:
        config, _, _ = configured(args)
        return dataclasses.replace(config, start_method="fork"), MODULES[module], [words]

    torchrun.config_from_args = forked
    launch.launch_command(launch.launch_command_parser().parse_args([*launcher, "-m", module, *words]))


def _compile_nothing() -> None:
    """DeepSpeed would compile its own communication between CPU processes, for a minute; without it there is gloo's."""
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
