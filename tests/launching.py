"""`accelerate launch` without its imports, which take each process of each launch 10 to 15 s.

One process imports all there is; launchers are its forks, and ranks are theirs. Everything else is accelerate's and
torchrun's own: configuration files, environments, rendezvous, watching over processes and what they say at the end.
"""

import dataclasses
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun

from tests import processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate.commands.launch", "bitsandbytes", "deepspeed", __name__])

MODULE = "tests.processes"


def launched(
    launcher: Sequence[str], words: Sequence[str], environment: dict[str, str], output: Path, timeout: float
) -> int:
    """Exit status of `accelerate launch LAUNCHER... -m tests.processes WORDS...`; one process, without a launcher.

    Args:
        output: file that takes what is printed, errors too.
        timeout: seconds after which it is killed, and `TimeoutError` raised.
    """
    process = FORKS.Process(target=_launch, args=(list(launcher), list(words), environment, output))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"no end after {timeout} s: {output.read_text()[-3000:]}")
    return process.exitcode


def _launch(launcher: list[str], words: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if not launcher:
        processes.main(words)
        return
    from accelerate.commands import launch

    configured = torchrun.config_from_args

    def forked(args: object) -> tuple:
        config, _, _ = configured(args)
        return dataclasses.replace(config, start_method="fork"), processes.main, [words]

    torchrun.config_from_args = forked
    launch.launch_command(launch.launch_command_parser().parse_args([*launcher, "-m", MODULE, *words]))
