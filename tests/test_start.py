"""What is imported before a command or a user needs it, each time in a process of its own. Oracle: `sys.modules`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atp.cli import COMMANDS
from tests.export.cases import exported
from tests.report import folders

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub", "scipy")
COMMAND = f"""
import sys
sys.argv = ["atp", *sys.argv[1:]]  # as its script is started
from atp.cli import main
assert main() == 0
assert not (found := [name for name in {HEAVY} if name in sys.modules]), found
"""
NAMES = """
import sys
sys.argv = ["atp"]
import atp
assert "torch" not in sys.modules
assert set(atp.__all__) < set(dir(atp))
from atp import *
assert all(callable(name) for name in (ATPCallback, ATPConfig, discover, export, load))
assert atp.export is export
try:
    atp.exprot
except AttributeError as error:
    assert "exprot" in str(error)
else:
    raise AssertionError
"""
SCRIPT = """
import sys
import atp
from transformers import AutoConfig
assert atp.load and atp.export.__name__ == "export"
print(AutoConfig.from_pretrained(sys.argv[1]).architectures)
"""
EVALUATION = """
import sys
folder, sys.argv = sys.argv[1], ["atp"]
import atp.commands.evaluate
from transformers import AutoConfig
print(AutoConfig.from_pretrained(folder).architectures)
"""


def python(*words):
    """What a process prints, and what it writes to standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_a_page_and_a_history_import_no_library_of_models(tmp_path):
    run = folders.run(tmp_path / "run")
    python("-c", COMMAND, "report", run)
    python("-c", COMMAND, "history", tmp_path)


def test_help_lists_every_command_and_imports_none():
    printed, imported = python("-X", "importtime", "-m", "atp", "--help")
    assert all(f"    {name} " in printed and what.split()[0] in printed for name, (_, what) in COMMANDS.items())
    assert not any(f" {name}\n" in imported for name in (*HEAVY, "atp.commands", "yaml"))


@pytest.mark.slow
def test_public_names_are_there_in_the_process_of_the_command():
    python("-c", NAMES)


@pytest.mark.slow
def test_exported_models_are_known_to_scripts_and_to_commands():
    folder = exported("llama", "width").folder
    assert "Pruned" in python("-c", SCRIPT, folder)[0]
    assert "Pruned" in python("-c", EVALUATION, folder)[0]
