"""Liger's kernels in a run with our callback. Oracle: the same run without Liger."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atp.layers import attachment_of
from tests import runs


@pytest.mark.parametrize(
    "changes",
    [{}, {"impl": "eager", "mode": "alternating"}, {"space": "disp"}],
    ids=["joint", "eager alternating", "disp"],
)
def test_liger_changes_nothing_that_is_decided(changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="Liger is not installed: pip install liger-kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.liger_run", str(tmp_path / "liger"), json.dumps(changes)]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    plain = runs.trainer(tmp_path / "plain", runs.config(**(runs.LATE | changes)))
    plain.train()
    assert set(found["used"]) == {"rope", "swiglu", "rms_norm", "fused_linear_cross_entropy"}
    assert min(found["used"].values()) >= runs.STEPS
    assert found["losses"] == pytest.approx(runs.losses(plain), abs=1e-4)
    assert found["masks"] == {name: mask.tolist() for name, mask in attachment_of(plain.model).masks.items()}
