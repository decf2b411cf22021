"""Two processes. Oracle: one process with twice the batch. (Other engines than DDP are not covered.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import runs

ROOT = Path(__file__).parents[1]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def ended(folder: Path, launcher: tuple[str, ...]) -> None:
    """Run it. gloo sometimes aborts at exit, so that what is there counts, not the status."""
    folder.mkdir()
    command = [sys.executable, *launcher, "-m", "tests.processes", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (folder / "decision-0.safetensors").exists(), done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Rows held out, a late start, the surgeon, compensation and distillation included."""
    ended(tmp_path / "one", ())
    ended(tmp_path / "two", TWO)
    one, first, second = (
        [load_file(tmp_path / folder / f"{what}-{rank}.safetensors") for what in ("adapter", "decision")]
        for folder, rank in (("one", 0), ("two", 0), ("two", 1))
    )
    assert runs.same(first[0], second[0])
    assert runs.same(first[1], second[1])
    assert runs.same(first[1], one[1])
    assert runs.worst(first[0], one[0]) < 1e-3
