"""Two processes on every engine, four on one. Oracles: one process with the whole batch; the uncut run.

Launched by accelerate's launcher: two machines, and a run killed in a step, by the command lines that users type, the
others as forks of what has imported everything (`tests/launching.py`), which takes a second. `make test` runs this file
by itself: each launch keeps two cores busy. `ATP_ENGINES=ddp,zero3` runs only these; `pytest -rP` prints how far two
processes are from one. Not covered: GPUs, FSDP's and DeepSpeed's offloading, and the communication between processes of
one CPU that DeepSpeed compiles.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atp import export, load
from tests import families, launching, runs, tiny
from tests.export.cases import masked

ROOT = Path(__file__).parents[1]
ENGINES = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPPeftModelForCausalLM",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
IN_PARTS = ("fsdp2", "zero3")
HYBRID = "hsdp"
"""FSDP2 in four processes: each part twice."""
CASES = ("joint", "alternating", "accumulated", "bf16")
ALSO = {"ddp": ("distilled", "spaces"), "fsdp2": ("spaces",)}
"""Distillation where weights are not in parts; joined spaces where it takes seconds, not a minute (ZeRO)."""
WHAT = ("adapter", "base", "logits", "decision")

ROUNDING = 1e-4
"""Relative, of weights after ten steps; sums are taken in another order."""

ROUNDING_OF_LOGITS = 3e-6
"""Relative too: ten steps of the generator change little of what its start has made of them."""

ROUNDING_BF16 = 5e-2
"""Absolute, of losses around 6: with another batch size or engine every product is rounded elsewhere."""


def ended(
    folder: Path, engine: str | None, module: str, *words: str, typed: bool = False
) -> subprocess.CompletedProcess:
    """Run a module in one process, or in several on an engine, to its end.

    Args:
        folder: takes `output.txt`: what is printed, errors too.
        typed: by the command line, where it would be a fork otherwise.
    """
    skip_unless_wanted(engine)
    output, launcher = folder / "output.txt", [] if engine is None else flags(engine)
    if typed:
        line = command(*launcher, "-m", module, *words)
        with output.open("wb") as file:
            status = subprocess.run(
                line, cwd=ROOT, env=environment(engine), stdout=file, stderr=file, timeout=launching.TIMEOUT
            ).returncode
    else:
        status = launching.launched(launcher, module, words, environment(engine), output)
    return subprocess.CompletedProcess(words, status, output.read_text())


def ran(folder: Path, engine: str | None, base: Path, *words: str) -> None:
    """Run cases by `tests.processes`, flags with them, to a good end."""
    done = ended(folder, engine, "tests.processes", str(folder), *words, "--base", str(base))
    last = folder / next(word for word in reversed(words) if not word.startswith("-")) / "seen-0.json"
    assert last.exists(), done.stdout[-3000:]  # not the status: gloo sometimes aborts at exit


def flags(engine: str, machine: int | None = None, port: int = 0) -> list[str]:
    """The launcher's flags, as many processes as the file says; a process of two machines where `machine` is given."""
    words = ["--config_file", f"configs/accelerate/{engine}.yaml"]
    if machine is not None:
        words += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(machine)]
        words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return words


def command(*words: str) -> list[str]:
    """A launch as users type it."""
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def environment(engine: str | None) -> dict[str, str]:
    """CPUs only; DeepSpeed leaves processes alone that accelerate counts as a CPU's."""
    deepspeed = engine is not None and engine.startswith("zero")
    on_cpu = (
        {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if deepspeed else {"ACCELERATE_USE_CPU": "true"}
    )
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | on_cpu


def skip_unless_wanted(engine: str | None) -> None:
    if engine is not None and engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: `make test` does it (DS_BUILD_OPS=0, it needs torch first)")
    if engine is not None and engine not in os.environ.get("ATP_ENGINES", ",".join((*ENGINES, HYBRID))).split(","):
        pytest.skip(f"ATP_ENGINES leaves {engine} out")


def left(folder: Path, case: str, what: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / case / f"{what}-{rank}.safetensors")


def seen(folder: Path, case: str, rank: int = 0) -> dict:
    return json.loads((folder / case / f"seen-{rank}.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model, which engines that share weights out load in their own ways."""
    return tiny.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in one process."""
    folder = tmp_path_factory.mktemp("alone")
    ran(folder, None, base, *ALSO["ddp"], *CASES)
    return folder


@pytest.fixture(scope="module", params=list(ENGINES))
def uncut(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An engine, and every case on it in two processes."""
    engine = request.param
    folder = tmp_path_factory.mktemp(engine)
    ran(folder, engine, base, *ALSO.get(engine, ()), *CASES)
    return engine, folder


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(alone: Path, uncut: tuple[str, Path]) -> None:
    """Losses, decisions at every step, and weights; rows held out, the start's scores and the refit included."""
    engine, two = uncut
    for case in sorted(p.name for p in two.iterdir() if p.is_dir()):
        here, there, one = seen(two, case), seen(two, case, 1), seen(alone, case)
        assert here["engine"] == ENGINES[engine]
        assert bool(here["in parts"]) == (engine in IN_PARTS)
        assert here["compact"] == (engine != "zero3"), "steps after the freeze compute what they need not"
        assert here["decisions"] == there["decisions"], "ranks decide otherwise"
        shared_out = sorted(here["refitted to"] + there["refitted to"])
        assert shared_out == list(range(len(shared_out))), "not shared out"
        if case != "alternating":  # whose calibration batches have fewer rows than one process's
            assert shared_out == one["refitted to"], "not shared out"
        assert all(runs.same(left(two, case, what), left(two, case, what, 1)) for what in WHAT), "ranks differ"
        worst = max(abs(a - b) for a, b in zip(here["losses"], one["losses"], strict=True))
        for mine, other in zip(here["held out"], one["held out"], strict=True):
            if mine["dense"] is None and engine in IN_PARTS:
                other = other | {"dense": None}  # an engine that holds weights in parts cannot undo the refit
            assert mine == pytest.approx(other, abs=ROUNDING_BF16 if case == "bf16" else ROUNDING)
        assert here["held out"][0]["dense"] is not None
        off = {what: runs.worst(left(two, case, what), left(alone, case, what)) for what in WHAT}
        same = sum(a == b for a, b in zip(here["decisions"], one["decisions"], strict=True))
        weights = ", ".join(f"{what} {error:.1e}" for what, error in off.items())
        print(f"{engine}, {case}: losses {worst:.1e}, {weights}, {same} of {len(one['decisions'])} decisions")
        if case == "bf16":
            assert worst < ROUNDING_BF16
            continue
        assert worst < ROUNDING
        assert here["decisions"] == one["decisions"]
        assert off["logits"] < ROUNDING_OF_LOGITS
        assert max(off.values()) < ROUNDING


@pytest.mark.slow
def test_what_two_processes_export_is_what_one_exports(alone: Path, uncut: tuple[str, Path]) -> None:
    _, two = uncut
    for case in ("joint", "accumulated"):  # both spaces
        mine, other = (load(folder / case / "pruned").double().state_dict() for folder in (two, alone))
        indices = [name for name, tensor in mine.items() if not tensor.is_floating_point()]
        assert runs.same({n: mine.pop(n) for n in indices}, {n: other.pop(n) for n in indices})
        assert runs.worst(mine, other) < ROUNDING
        assert {p.name for p in (two / case / "final").iterdir()} == {
            p.name for p in (alone / case / "final").iterdir()
        }


@pytest.mark.slow
def test_two_machines_are_as_two_processes_of_one(uncut: tuple[str, Path], base: Path, tmp_path: Path) -> None:
    """As `configs/README.md` has it: the same command on each, but for its rank. Two launchers stand for machines."""
    engine, one_machine = uncut
    if engine != "ddp":
        pytest.skip("shown on ddp: how processes find each other does not depend on the engine")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = ("-m", "tests.processes", str(tmp_path), "joint", "--base", str(base))
    machines = [command(*flags(engine, machine, port), *words) for machine in (0, 1)]
    started = [subprocess.Popen(machine, cwd=ROOT, env=environment(engine)) for machine in machines]
    for machine in started:
        machine.wait(timeout=300)
    assert all(runs.same(left(tmp_path, "joint", what), left(one_machine, "joint", what)) for what in WHAT)
    assert seen(tmp_path, "joint", 1)["decisions"] == seen(one_machine, "joint")["decisions"]


@pytest.mark.slow
@pytest.mark.parametrize("prunes", [True, False])
def test_the_command_ends_with_its_results(base: Path, tmp_path: Path, prunes: bool) -> None:
    """`accelerate launch -m atp train`, with pruning and without, where the most is special."""
    engine = "zero3"
    skip_unless_wanted(engine)
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(80)), tiny.jsonl(tmp_path / "held.jsonl", range(80, 100))
    pruning = {"calibration_rows": 4, "calibration_batch_size": 2, "round_to": 1, "refit_rows": 4}
    pruning |= {"refit_first_tokens": 0, "start_at": 0.0, "freeze_at": 0.5}
    recipe = {
        "model": {"name_or_path": str(base)},
        "data": {"train": str(rows[0]), "validation": str(rows[1]), "max_length": 32},
        "output_dir": str(tmp_path / "run"),
        "atp": pruning if prunes else False,
        "training": {"max_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "no", "disable_tqdm": True},
    }
    recipe["training"] |= {"use_cpu": False, "ddp_backend": "gloo"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = ended(tmp_path, engine, "atp", "train", str(tmp_path / "recipe.yaml"))
    results = tmp_path / "run" / "metrics.json"
    assert results.exists(), done.stdout[-3000:]
    assert json.loads(results.read_text())["validation"]["perplexity"] > 0
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


KILLED_IN_STEP = ("ddp", "zero3")
"""Of the others it is known already: the launcher is the same."""

TYPED = ("ddp", "step")
"""What is killed in a launch by the command line."""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_killed_process_ends_the_run_and_what_was_saved_resumes_exactly(
    uncut: tuple[str, Path], base: Path, tmp_path: Path, where: str
) -> None:
    engine, whole = uncut
    if where == "step" and engine not in KILLED_IN_STEP:
        pytest.skip(f"shown on {', '.join(KILLED_IN_STEP)}, which are launched and ended alike")
    start = time.monotonic()
    words = (str(tmp_path), "joint", "--killed", where, "--base", str(base))
    killed = ended(tmp_path, engine, "tests.processes", *words, typed=(engine, where) == TYPED)
    assert killed.returncode != 0
    assert "this process is killed now" in killed.stdout
    assert time.monotonic() - start < 60
    assert not (tmp_path / "joint" / "pruned").exists()
    ran(tmp_path, engine, base, "joint", "--resume")
    assert (tmp_path / "joint" / "_unfinished-checkpoint-6").exists() == (where == "save")
    assert all(runs.same(left(tmp_path, "joint", what), left(whole, "joint", what)) for what in WHAT)
    steps = seen(tmp_path, "joint")["decisions"]
    assert steps == seen(whole, "joint")["decisions"][-len(steps) :]


@pytest.mark.slow
def test_an_alert_ends_all_processes_at_the_same_step_and_none_once_resumed(
    uncut: tuple[str, Path], base: Path, tmp_path: Path
) -> None:
    engine, _ = uncut
    if engine != "ddp":
        pytest.skip("shown on ddp: who stops whom does not depend on the engine")
    steps = []
    for words in (("stopped",), ("stopped", "--resume")):
        ran(tmp_path, engine, base, *words)
        mine, other = (seen(tmp_path, "stopped", rank)["decisions"] for rank in (0, 1))
        assert mine == other
        steps.append(len(mine))
    assert 0 < steps[0] < runs.STEPS
    assert sum(steps) == runs.STEPS


@pytest.mark.slow
def test_parts_held_twice_equal_one_process_and_resume_exactly(alone: Path, base: Path, tmp_path: Path) -> None:
    """Hybrid sharding: what two processes share out, two others hold as well."""
    skip_unless_wanted(HYBRID)
    ran(tmp_path, HYBRID, base, "spaces", "joint")
    for case in ("spaces", "joint"):
        ranks, one = [seen(tmp_path, case, rank) for rank in range(4)], seen(alone, case)
        assert all(rank["in parts"] and rank["decisions"] == one["decisions"] for rank in ranks)
        assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=ROUNDING)
        off = {what: runs.worst(left(tmp_path, case, what), left(alone, case, what)) for what in WHAT}
        print(f"{HYBRID}, {case}: " + ", ".join(f"{what} {error:.1e}" for what, error in off.items()))
        assert off["logits"] < ROUNDING_OF_LOGITS
        assert max(off.values()) < ROUNDING
    cut = tmp_path / "cut"
    cut.mkdir()
    killed = ended(cut, HYBRID, "tests.processes", str(cut), "joint", "--killed", "save", "--base", str(base))
    assert "this process is killed now" in killed.stdout
    ran(cut, HYBRID, base, "joint", "--resume")
    for rank in range(4):
        assert all(runs.same(left(cut, "joint", what, rank), left(tmp_path, "joint", what, rank)) for what in WHAT)


@pytest.mark.slow
def test_an_export_with_sizes_of_its_own_is_loaded_in_parts(tmp_path: Path) -> None:
    """With norms over heads, biases, and a stream that is cut."""
    folders = []
    for family, space in (("olmo2", "width"), ("llama_biases", "disp")):
        model = masked(families.with_lora(families.build(family)), space)
        folders.append(export(model, tmp_path / family))
    done = ended(tmp_path, "zero3", "tests.in_parts", str(tmp_path), *map(str, folders))
    for folder in folders:
        whole = tmp_path / f"{folder.name}.safetensors"
        assert whole.exists(), done.stdout[-3000:]
        model = load(folder)
        assert runs.same(load_file(whole), dict(model.named_parameters()) | dict(model.named_buffers()))
