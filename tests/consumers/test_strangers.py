"""Exported folders where atp cannot be imported: behaviours x spaces x families.

Oracle: the masked float32 model's logits, saved by this process; for everything else, the loaded model itself. All
cases are checked by one process (`stranger.py`, which says what each behaviour is); a test reads one cell of it.
"""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from tests import families
from tests.consumers import stranger
from tests.export.cases import CASES, exported


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Per case and behaviour, "" or what went wrong."""
    folder = tmp_path_factory.mktemp("strangers")
    cases = []
    for family, space in CASES:
        case = exported(family, space)
        save_file({"tokens": families.tokens(), "logits": case.logits}, f"{case.folder}.safetensors")
        needs_file = (case.folder / "modeling_atp.py").exists()
        cases.append({"name": f"{family} {space}", "folder": str(case.folder), "trust": needs_file})
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, stranger.__file__, "cases.json", "results.json", "scratch"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("family", "space"), CASES)
@pytest.mark.parametrize("behaviour", stranger.BEHAVIOURS)
def test_a_stranger_can(behaviour, family, space, found):
    if package := stranger.missing(behaviour):
        pytest.skip(f"needs {package}: pip install {package}")
    assert found[f"{family} {space}"][behaviour] == ""
