"""Liger's fused loss in a run with our callback. Oracle: the same run without Liger.

In a process of its own, for Triton interprets kernels there, and Liger changes transformers' classes. Not run: its RoPE
(most of a minute a step in the interpreter), RMSNorm and SwiGLU (their kernels take Python numbers, which it refuses).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atp.layers import attachment_of
from tests import runs

RUN = """
import json, sys
from pathlib import Path
from liger_kernel.ops import fused_linear_cross_entropy as fused
from atp.layers import attachment_of
from tests import runs

calls, own = [], fused.fused_linear_cross_entropy_forward

def forward(*args, **kwargs):
    calls.append(1)
    return own(*args, **kwargs)

fused.fused_linear_cross_entropy_forward = forward
parts = {"rope": False, "swiglu": False, "rms_norm": False, "cross_entropy": False, "fused_linear_cross_entropy": True}
run = runs.trainer(Path(sys.argv[1]), runs.config(**runs.LATE), use_liger_kernel=True, liger_kernel_config=parts)
run.train()
losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
masks = {name: mask.tolist() for name, mask in attachment_of(run.model).masks.items()}
print(json.dumps({"losses": losses, "masks": masks, "calls": len(calls)}))
"""


def test_ligers_fused_loss_changes_nothing_that_is_decided(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="Liger is not installed: pip install liger-kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RUN, str(tmp_path / "liger")]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    plain = runs.trainer(tmp_path / "plain", runs.config(**runs.LATE))
    plain.train()
    assert found["calls"] >= runs.STEPS
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert found["losses"] == pytest.approx(losses, abs=1e-4)
    assert found["masks"] == {name: mask.tolist() for name, mask in attachment_of(plain.model).masks.items()}
