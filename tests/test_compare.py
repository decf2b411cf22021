"""`atp compare` on tiny models. Oracles: rows and files left behind, exit status, and which runs were started.

Runs happen in this process, to be quick, but for tests of real children.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from atp.cli import main
from atp.commands import compare
from atp.commands.comparison import child
from tests import tiny

TIMINGS = "dense,atp,tune-then-prune:magnitude"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.jsonl(folder / "train.jsonl", range(120))
    tiny.jsonl(folder / "validation.jsonl", range(120, 140))
    return tiny.folder(folder)


@pytest.fixture
def recipe(base, tmp_path):
    return {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "train": str(base / "train.jsonl"),
            "validation": str(base / "validation.jsonl"),
            "max_length": 16,
            "validation_windows": 8,
        },
        "lora": {"r": 4},
        "atp": {"sparsity": 0.4, "calibration_rows": 4, "calibration_batch_size": 2},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def command(recipe, tmp_path):
    """`atp compare` with more arguments; gives the exit status."""

    def run(*arguments):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return main(["compare", str(path), *(str(a) for a in arguments)])

    return run


@pytest.fixture
def started(monkeypatch):
    """Names of the runs started, each in this process; a test may put an exit status, or an exception, under a name."""
    names, outcomes = [], {}

    def launch(arguments, log, jobs=1):
        name = log.parent.name
        names.append(name)
        outcome = outcomes.get(name, 0)
        if isinstance(outcome, type):
            raise outcome
        with log.open("w") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if outcome:
                print("Traceback\n\natp: it broke\nWriting:  50%|###\r", flush=True)
            return outcome or main(arguments)

    monkeypatch.setattr(child, "launch", launch)
    return names, outcomes


@pytest.fixture
def faked(started, monkeypatch):
    """As `started`, but a run only writes metrics: for tests of what happens around the runs."""
    names, outcomes = started

    def launch(arguments, log, jobs=1):
        names.append(log.parent.name)
        outcome = outcomes.get(names[-1], 0)
        if isinstance(outcome, type):
            raise outcome
        log.write_text("loading\nTraceback ...\natp: it broke\nWriting:  50%|###\r")
        if not outcome:
            pruned = {"parameters": 10, "flops_per_token": 20, "prefill": {"latency_ms": 1.0}}
            pruned["decode"] = {"latency_ms_per_token": 1.0}
            metrics = {
                "training": {"train_runtime": 1.0, "peak_memory_mib": None},
                "pruned": pruned,
                "validation": {"nll": 1.0, "perplexity": 2.718},
                "versions": {},
            }
            if yaml.safe_load((log.parent / "recipe.yaml").read_text())["data"].get("tasks"):
                metrics["tasks"] = {"finding": {"metric": "acc", "value": 0.5}}
            (log.parent / "final").mkdir(exist_ok=True)
            (log.parent / "metrics.json").write_text(json.dumps(metrics))
        return outcome

    monkeypatch.setattr(child, "launch", launch)
    return names, outcomes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_row_a_run_then_nothing_to_do_then_only_the_cut_row_again(command, started, tmp_path, capsys):
    names, _ = started
    out, arguments = tmp_path / "run" / "compare", ["--strategies", TIMINGS, "--sparsity", "0.3", "--seeds", "0,1"]
    assert command(*arguments, "--json", tmp_path / "results.json") == 0
    assert sorted(names) == sorted(
        f"{strategy}-seed{seed}"
        for strategy in ("dense", "atp-0.3", "tune-then-prune-magnitude-0.3")
        for seed in (0, 1)
    )
    first = {row["name"]: row for row in rows(out / "rows.jsonl")}
    assert len(first) == 6
    atp = first["atp-0.3-seed1"]
    assert (atp["recipe"]["atp"]["seed"], atp["recipe"]["training"]["seed"], atp["seed"]) == (1, 1, 1)
    assert atp["recipe"]["atp"]["sparsity"] == atp["pruning"]["sparsity_asked"] == 0.3
    assert first["dense-seed0"]["recipe"]["atp"] is False
    assert first["dense-seed0"]["validation"]["nll"] != first["dense-seed1"]["validation"]["nll"]
    assert set(first["tune-then-prune-magnitude-0.3-seed0"]["pruning"]["overlap_with_start"]) == {"kv", "mlp"}

    results = json.loads((out / "results.json").read_text())
    assert results == json.loads((tmp_path / "results.json").read_text())
    by_name = {cell["strategy"]: cell for cell in results["summary"]}
    assert by_name["dense"]["seeds"] == 2
    mean = sum(first[f"atp-0.3-seed{seed}"]["validation"]["nll"] for seed in (0, 1)) / 2
    assert by_name["atp"]["nll"]["mean"] == pytest.approx(mean)
    assert set(results["answers"]) >= {"When should I prune?", "How far can I go?"}
    printed = capsys.readouterr().out
    assert "6 of 6" in printed
    assert max(map(len, printed[printed.index("30 % removed\n") : printed.index("written")].splitlines())) <= 100
    assert sorted(p.name for p in (out / "runs" / "atp-0.3-seed0").iterdir()) == [
        "journal.jsonl",
        "metrics.json",
        "recipe.yaml",
        "report.html",
        "train.log",
    ]

    names.clear()
    assert command(*arguments) == 0
    assert names == []
    journal = out / "rows.jsonl"
    last = rows(journal)[-1]["name"]
    os.truncate(journal, journal.stat().st_size - 40)
    assert command(*arguments) == 0
    assert names == [last]
    again = {row["name"]: row for row in rows(journal)}
    assert again[last]["validation"]["nll"] == pytest.approx(first[last]["validation"]["nll"], rel=1e-6)
    assert {k: v for k, v in again.items() if k != last} == {k: v for k, v in first.items() if k != last}


def test_every_strategy_at_several_learning_rates(command, recipe, started, tmp_path, capsys):
    names, _ = started
    recipe["training"]["learning_rate"] = 1e-3
    out, arguments = tmp_path / "run" / "compare", ["--strategies", "dense,atp", "--learning-rates", "1e-5,1e-3"]
    assert command("--strategies", "dense") == 0
    assert command(*arguments) == 0
    assert names == ["dense-seed0", "dense-lr1e-05-seed0", "atp-0.4-lr1e-05-seed0", "atp-0.4-seed0"]
    rates = {row["name"]: row["recipe"]["training"]["learning_rate"] for row in rows(out / "rows.jsonl")}
    assert rates == {name: 1e-5 if "lr" in name else 1e-3 for name in names}
    summary = json.loads((out / "results.json").read_text())["summary"]
    assert [(cell["strategy"], cell["by_rate"].keys()) for cell in summary] == [
        (strategy, {"0.001", "1e-05"}) for strategy in ("dense", "atp")
    ]
    by_name = {row["name"]: row["validation"]["nll"] for row in rows(out / "rows.jsonl")}
    assert summary[0]["nll"]["mean"] == min(nll for name, nll in by_name.items() if "dense" in name)

    assert command(*arguments) == 0
    assert len(names) == 4
    assert command(*arguments, "--training.max_steps", "3") == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["0", "-1e-3", "nan", "inf"])
def test_a_learning_rate_that_is_none(command, faked, capsys, given):
    assert command("--strategies", "dense", f"--learning-rates={given}") == 2
    assert f"--learning-rates {given} is not allowed: give positive numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("--strategies", "atp", "--keep-models", "--out", tmp_path / "out") == 0
    (row,) = rows(tmp_path / "out" / "rows.jsonl")
    folder = tmp_path / "out" / "runs" / "atp-0.4-seed0"
    assert row["status"] == "ok"
    assert (folder / "pruned" / "config.json").is_file()
    assert "FLOPs per token" in (folder / "train.log").read_text()


def test_a_failed_row_says_in_one_line_how_the_run_ended(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("loading\natp: x.yaml: cannot be read\nsome library says goodbye\n")
    assert child._last_error(2, log) == "x.yaml: cannot be read"
    assert child._last_error(-signal.SIGKILL, log) == "killed by SIGKILL (often: out of memory)"
    log.write_text("loading\nRuntimeError: out of luck\n")
    assert child._last_error(1, log) == "RuntimeError: out of luck"
    log.write_text("")
    assert child._last_error(1, log) == "ended without a word"


def test_a_failed_run_leaves_the_others_and_is_tried_again(command, faked, tmp_path, capsys):
    names, outcomes = faked
    outcomes["atp-0.2-seed0"] = 3
    arguments = ["--strategies", "atp,paper", "--sparsity", "0.2,0.4"]
    assert command(*arguments) == 1
    assert len(names) == 4
    out = tmp_path / "run" / "compare"
    found = {row["name"]: row for row in rows(out / "rows.jsonl")}
    bad = found.pop("atp-0.2-seed0")
    assert (bad["status"], bad["exit_status"], bad["error"]) == ("failed", 3, "it broke")
    assert {row["status"] for row in found.values()} == {"ok"}
    assert "FAILED with exit status 3" in capsys.readouterr().out
    assert "atp-0.2-seed0" in (out / "results.md").read_text()

    names.clear()
    outcomes.clear()
    assert command(*arguments) == 0
    assert names == ["atp-0.2-seed0"]
    assert json.loads((out / "results.json").read_text())["failed"] == []


def test_a_loss_that_is_not_finite_is_a_failed_run(command, faked, monkeypatch, tmp_path):
    launch = child.launch

    def diverged(arguments, log, jobs=1):
        status = launch(arguments, log, jobs)
        metrics = json.loads((log.parent / "metrics.json").read_text())
        metrics["validation"]["nll"] = float("nan")
        (log.parent / "metrics.json").write_text(json.dumps(metrics))
        return status

    monkeypatch.setattr(child, "launch", diverged)
    assert command("--strategies", "atp") == 1
    assert rows(tmp_path / "run" / "compare" / "rows.jsonl")[0]["error"] == "the validation loss is not finite"


def test_ctrl_c_ends_with_a_message_and_the_same_command_goes_on(command, faked, tmp_path, capsys):
    names, outcomes = faked
    handler = signal.getsignal(signal.SIGTERM)
    outcomes["paper-0.4-seed0"] = KeyboardInterrupt
    assert command("--strategies", "atp,paper") == 130
    assert "stopped: 1 finished run(s)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == handler
    outcomes.clear()
    names.clear()
    assert command("--strategies", "atp,paper") == 0
    assert names == ["paper-0.4-seed0"]


def test_jobs_run_side_by_side_and_every_row_says_so(command, faked, monkeypatch, tmp_path):
    names, outcomes = faked
    outcomes["paper-0.4-seed0"] = 3
    together, one_run = threading.Barrier(2), child.launch

    def launch(arguments, log, jobs=1):
        together.wait(timeout=30)  # breaks unless two are running
        return one_run(arguments, log, jobs)

    monkeypatch.setattr(child, "launch", launch)
    assert command("--strategies", "atp,paper", "--seeds", "0,1", "--jobs", "2") == 1
    found = {row["name"]: row for row in rows(tmp_path / "run" / "compare" / "rows.jsonl")}
    assert len(found) == len(names) == 4
    assert {row["jobs"] for row in found.values()} == {2}
    assert [name for name, row in found.items() if row["status"] == "failed"] == ["paper-0.4-seed0"]


def test_a_folder_that_another_comparison_writes_to_is_refused(command, faked, tmp_path, capsys):
    names, _ = faked
    out = tmp_path / "run" / "compare"
    (out / "runs").mkdir(parents=True)
    with FileLock(out / "runs" / ".lock"):
        assert command("--strategies", "atp") == 2
    assert "another atp compare is running in" in capsys.readouterr().err
    assert names == []
    assert command("--strategies", "atp") == 0


def test_children_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(child.os, "cpu_count", lambda: 8)
    assert "OMP_NUM_THREADS" not in child._environment(1)
    assert child._environment(3)["OMP_NUM_THREADS"] == "2"
    assert child._environment(16)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert child._environment(3)["OMP_NUM_THREADS"] == "5"


def test_all_children_are_killed_when_the_command_is_stopped(monkeypatch, tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(child.sys, "executable", str(slow))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(child.launch, ["train"], tmp_path / f"{i}.log") for i in range(2)]
        while len(child._alive) < 2:
            time.sleep(0.01)
        child.stop_children()
        assert [future.result(timeout=30) for future in running] == [-9, -9]
    assert not child._alive


@pytest.mark.slow
def test_a_run_ends_when_the_comparison_is_killed_outright(recipe, tmp_path):
    recipe["training"]["max_steps"] = 10**6
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    script = "import sys, pathlib; from atp.commands.comparison.child import launch; "
    script += "launch(['train', sys.argv[1]], pathlib.Path(sys.argv[2]))"
    comparison = subprocess.Popen([sys.executable, "-c", script, str(path), str(tmp_path / "log")])
    children = []
    try:
        while not (tmp_path / "run").exists():  # it trains
            children = psutil.Process(comparison.pid).children()
            assert comparison.poll() is None
            time.sleep(0.1)
        comparison.kill()
        comparison.wait()
        gone, _ = psutil.wait_procs(children, timeout=60)
        assert gone == children != []
    finally:
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def test_a_changed_recipe_is_refused_or_overwritten(command, faked, recipe, tmp_path, capsys):
    names, _ = faked
    assert command("--strategies", "atp,paper", "--seeds", "0,1") == 0
    capsys.readouterr()
    names.clear()
    recipe["training"]["max_steps"] = 6
    assert command("--strategies", "atp") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "training.max_steps: 4 there, 6 now" in line
    assert "--overwrite" in line
    assert len(rows(tmp_path / "run" / "compare" / "rows.jsonl")) == 4
    assert names == []
    assert command("--strategies", "atp", "--overwrite") == 0
    assert names == ["atp-0.4-seed0"]
    assert [row["name"] for row in rows(tmp_path / "run" / "compare" / "rows.jsonl")] == ["atp-0.4-seed0"]


def test_a_setting_newer_than_the_row_counts_with_its_default(command, faked, tmp_path):
    names, _ = faked
    journal = tmp_path / "run" / "compare" / "rows.jsonl"
    assert command("--strategies", "atp") == 0
    (row,) = rows(journal)
    del row["recipe"]["atp"]["lasso"]
    journal.write_text(json.dumps(row) + "\n")
    names.clear()
    assert command("--strategies", "atp") == 0
    assert names == []


def test_a_row_that_was_not_scored_counts_and_one_scored_otherwise_does_not(command, faked, base, tmp_path, capsys):
    names, _ = faked
    assert command("--strategies", "atp") == 0
    names.clear()
    task = ("--data.tasks.finding", tiny.jsonl(tmp_path / "task.jsonl", range(140, 144)))
    assert command("--strategies", "atp", *task) == 0
    assert names == []
    assert "1 finished run(s), atp-0.4-seed0 first, were made before" in capsys.readouterr().out
    assert command("--strategies", "atp,paper", *task) == 0
    assert names == ["paper-0.4-seed0"]
    capsys.readouterr()
    assert command("--strategies", "atp,paper", *task, "--data.task_rows", 2) == 2
    assert "paper-0.4-seed0: data.task_rows: None there, 2 now" in capsys.readouterr().err
    learned = ("--data.tasks.finding", base / "train.jsonl", "--out", tmp_path / "other")
    assert command("--strategies", "paper", *learned) == 2
    assert "row(s) are in both the training and the finding set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "setting", "extended"),
    [
        ("prune-then-tune:flap", "noise", True),
        ("prune-then-tune:flap", "generator_lr", True),
        ("prune-then-tune:flap", "calibration_rows", False),
        ("prune-then-tune:flap/global", "init_trials", True),
        ("prune-then-tune:flap/global", "init_tilt", False),
        ("atp", "noise", False),
        ("atp", "shots", True),
    ],
)
def test_a_default_that_a_run_never_looks_at_may_change(command, faked, tmp_path, strategy, setting, extended):
    names, _ = faked
    journal = tmp_path / "run" / "compare" / "rows.jsonl"
    assert command("--strategies", strategy) == 0
    (row,) = rows(journal)
    row["recipe"]["atp"][setting] = 7
    journal.write_text(json.dumps(row) + "\n")
    names.clear()
    assert command("--strategies", strategy) == (0 if extended else 2)
    assert names == []


def test_strategies_agree_on_everything_but_the_atp_section(command, faked, tmp_path):
    assert command("--strategies", "dense,atp,logits,paper,prune-then-tune:flap/global") == 0
    recipes = [row["recipe"] for row in rows(tmp_path / "run" / "compare" / "rows.jsonl")]
    assert len(recipes) == 5
    others = [{k: v for k, v in recipe.items() if k != "atp"} for recipe in recipes]
    assert all(other == others[0] for other in others)
    assert recipes[-1]["atp"]["init_ranking"] == "global"


def test_without_matplotlib_tables_are_still_written(command, faked, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert command("--strategies", "atp") == 0
    assert "pip install 'atp[plots]'" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "run" / "compare").iterdir()) == [
        "results.json",
        "results.md",
        "rows.jsonl",
        "runs",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "atp,prune-then-tune:magnitud"], "did you mean 'prune-then-tune:magnitude'?"),
        (["--strategies", " , "], "--strategies is empty"),
        (["--sparsity", "0.2,much"], "--sparsity 0.2,much: could not convert"),
        (["--sparsity", "1.5"], "sparsity=1.5 is not allowed"),
        (["--sparsity", "0.999"], "sparsity"),
        (["--jobs", "0"], "--jobs 0 is not allowed: give 1 or more"),
        (["--seeds", "0,-1"], "seed=-1 is not allowed"),
        (["--seeds", "0,1.5"], "--seeds 0,1.5: invalid literal"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.validation", "null"], "data: `validation` is missing"),
        (["--data.validation_windows", "0"], "validation_windows=0 is not allowed"),
        (["--data.tasks.finding", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.tasks.finding", "3"], "tasks={'finding': 3} is not allowed"),
        (["--data.task_rows", "0"], "task_rows=0 is not allowed"),
        (["--training.max_step", "5"], "did you mean 'max_steps'?"),
        (["--training.eval_strategy", "sometimes"], "training: "),
        (["--model.name_or_path", "./nowhere"], "./nowhere: no such folder"),
        (["--atp", "false"], "--sparsity is missing"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_runs(command, faked, tmp_path, capsys, arguments, message):
    names, _ = faked
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert names == []
    assert not (tmp_path / "run").exists()


def test_a_damaged_journal_is_refused(command, faked, tmp_path, capsys):
    journal = tmp_path / "run" / "compare" / "rows.jsonl"
    assert command("--strategies", "atp") == 0
    journal.write_text("{]\n" + journal.read_text())
    capsys.readouterr()
    assert command("--strategies", "atp") == 2
    assert "rows.jsonl, line 1: is not a row" in capsys.readouterr().err
    shutil.rmtree(journal.parent)
    assert command("--strategies", "atp") == 0


def test_rows_of_a_comparison_leave_the_values_by_row_in_the_runs_folder():
    results = {
        "pruned": {"parameters": 3},
        "tasks": {"finding": {"metric": "acc", "value": 0.5, "items": {"acc": [1.0]}}},
    }
    kept = child._without_items(results)
    assert kept == results | {"tasks": {"finding": {"metric": "acc", "value": 0.5}}}
    assert child._without_items({"pruned": {}}) == {"pruned": {}}


@pytest.mark.parametrize("folder", ["lr[bold]", "lr[/x]"])
def test_a_folder_whose_name_looks_like_markup_is_shown_as_it_is(command, faked, monkeypatch, tmp_path, folder):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=1000)
    monkeypatch.setattr(compare, "Console", lambda: terminal)
    assert command("--strategies", "atp,paper", "--out", tmp_path / folder) == 0
    assert f"({tmp_path / folder / 'runs' / 'atp-0.4-seed0' / 'train.log'})" in screen.getvalue()


@pytest.mark.parametrize("missing", ["validation", "tasks"])
def test_a_run_that_could_not_be_measured_is_a_failed_run(recipe, command, faked, monkeypatch, tmp_path, missing):
    launch = child.launch
    if missing == "tasks":
        recipe["data"]["tasks"] = {"finding": str(tiny.jsonl(tmp_path / "task.jsonl", range(140, 144)))}

    def unmeasured(arguments, log, jobs=1):
        status = launch(arguments, log, jobs)
        metrics = json.loads((log.parent / "metrics.json").read_text())
        metrics.pop(missing)
        (log.parent / "metrics.json").write_text(json.dumps(metrics))
        return status

    monkeypatch.setattr(child, "launch", unmeasured)
    assert command("--strategies", "atp") == 1
    error = rows(tmp_path / "run" / "compare" / "rows.jsonl")[0]["error"]
    assert error == "there was no room on the GPU to measure it"


def test_a_base_model_that_lies_in_a_run_of_it_is_not_removed(recipe, command, faked, tmp_path, capsys):
    pruned = tmp_path / "out" / "runs" / "atp-0.4-seed0" / "pruned"
    tiny.folder(pruned)
    recipe["model"]["name_or_path"] = str(pruned)
    assert command("--strategies", "atp", "--out", tmp_path / "out", "--overwrite") == 2
    assert "which would be replaced" in capsys.readouterr().err
    assert (pruned / "model.safetensors").is_file()
    assert not faked[0]
