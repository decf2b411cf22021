"""One run of a comparison in a process of its own, so that whatever ends it ends nothing else."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import atp
from atp.commands.comparison import bound
from atp.commands.comparison.plan import Run, identity
from atp.files import remove, write_text

_WEIGHTS = ("checkpoint-*", "final", "pruned")
_LOG = "train.log"

_alive: set[subprocess.Popen] = set()
"""Children that run now."""


def run_child(run: Run, jobs: int = 1) -> dict[str, Any]:
    """Train, and give the run's row: its `status` is `ok`, with all metrics, or `failed`, with what it ended with.

    Args:
        jobs: how many such runs share the machine: each gets its share of the CPU cores.
    """
    folder = Path(run.recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    recipe, metrics = folder / "recipe.yaml", folder / "metrics.json"
    write_text(recipe, run.recipe.to_yaml())
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    status = launch(["train", str(recipe), "--overwrite"], folder / _LOG, jobs)
    row: dict[str, Any] = {
        "name": run.name,
        "strategy": run.strategy,
        "sparsity": run.sparsity,
        "seed": run.seed,
        **({} if run.learning_rate is None else {"learning_rate": run.learning_rate}),
        "status": "ok",
        "seconds": time.perf_counter() - start,
        "jobs": jobs,
        "recipe": identity(run.recipe),
    }
    if status or not metrics.is_file():
        return row | {"status": "failed", "exit_status": status, "error": _last_error(status, folder / _LOG)}
    results = json.loads(metrics.read_text(encoding="utf-8"))
    if "validation" not in results or (run.recipe.data.tasks and "tasks" not in results):
        return row | {"status": "failed", "exit_status": status, "error": "there was no room on the GPU to measure it"}
    if not math.isfinite(results["validation"]["nll"]):
        return row | {"status": "failed", "exit_status": status, "error": "the validation loss is not finite"}
    return row | _without_items(results)


def _without_items(results: dict[str, Any]) -> dict[str, Any]:
    """Scores of tasks without their values by row, which stay in the run's folder."""
    tasks = {
        name: {key: value for key, value in score.items() if key != "items"}
        for name, score in results.get("tasks", {}).items()
    }
    return results | ({"tasks": tasks} if tasks else {})


def launch(arguments: list[str], log: Path, jobs: int = 1) -> int:
    """`atp ARGUMENTS`, no longer than we live, with all it prints in `log`; the exit status, negative for a signal."""
    command = [sys.executable, "-m", bound.__name__, str(os.getpid()), *arguments]
    environment = _environment(jobs)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        _alive.add(process)
        try:
            return process.wait()
        finally:
            _alive.discard(process)


def stop_children() -> None:
    """Kill what is running, so that nothing writes to a folder that the next try uses."""
    for process in tuple(_alive):
        process.kill()


def remove_weights(run: Run) -> None:
    """Free the disk: metrics, recipe and log stay."""
    for pattern in _WEIGHTS:
        for path in Path(run.recipe.output_dir).glob(pattern):
            with suppress(OSError):
                remove(path)


def _environment(jobs: int) -> dict[str, str]:
    """The child imports the `atp` that runs here, installed or not, and takes no core from its neighbours."""
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    home = str(Path(atp.__file__).parents[1])
    if home != sysconfig.get_path("purelib"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return environment


def _last_error(status: int, log: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
    ours = [line for line in lines if line.startswith("atp: ")]  # libraries may print more after it
    return (ours or lines)[-1].strip().removeprefix("atp: ") or "ended without a word"
