"""The shell, in this process. Oracles: exit status, the one line on standard error, and the files left behind."""

import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import DistributedType
from filelock import FileLock
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atp.cli import build_parser, main
from atp.commands.train import _say_that_nothing_is_sharded
from atp.errors import ATPError
from atp.evaluation import perplexity
from atp.files import write_json, written_beside
from atp.recipe import Recipe
from tests import tiny

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(base, tmp_path):
    """A recipe of six steps on tiny data; the test may change it before it is written."""
    return {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "train": str(tiny.jsonl(tmp_path / "train.jsonl", range(120))),
            "validation": str(tiny.jsonl(tmp_path / "validation.jsonl", range(120, 140))),
            "max_length": 16,
        },
        "lora": {"r": 4},
        "atp": {"sparsity": 0.4, "calibration_rows": 4, "calibration_batch_size": 2},
        "training": {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }


def written(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_inspect_counts_what_is_there_and_what_is_left(base, tmp_path, capsys):
    out = tmp_path / "inspect.json"
    assert main(["inspect", str(base), "--sparsity", "0.5", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    # per block: q and o 32x32, k and v 16x32, gate, up and down 48x32
    assert found["prunable_parameters"] == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert found["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert found["sparsity_achieved"] == pytest.approx(0.5, abs=0.02)
    by_kind = {group["kind"]: group for group in found["groups"]}
    assert (by_kind["kv"]["size"], by_kind["kv"]["parameters"]) == (2, (2 * 16 + 2 * 8) * 32)
    assert (by_kind["mlp"]["size"], by_kind["mlp"]["parameters"]) == (48, 3 * 32)
    kept = sum(g["kept"] * g["parameters"] * blocks(g["blocks"]) for g in found["groups"])
    assert found["prunable_parameters"] - kept == found["parameters_removed"]
    assert "what is kept" in capsys.readouterr().out


def blocks(name):
    first, _, last = name.partition("-")
    return int(last or first) - int(first) + 1


@pytest.mark.parametrize(
    "options",
    [
        *(["--uniform"], ["--space", "disp"], ["--round-to", "16"]),
        *(["--space", "hidden"], ["--space", "values"], ["--space", "width+depth"], ["--space", "depth", "--uniform"]),
    ],
)
def test_inspect_other_spaces(base, tmp_path, options):
    out = tmp_path / "inspect.json"
    assert main(["inspect", str(base), *options, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["sparsity_achieved"] >= 0.4
    if options == ["--uniform"]:
        assert {g["blocks"] for g in found["groups"]} == {"0-3"}


def test_a_rotated_model_is_the_same_and_can_lose_value_dimensions(base, recipe, tmp_path, capsys):
    rows, out = tiny.jsonl(tmp_path / "rows.jsonl", range(6)), tmp_path / "rotated"
    argv = ["rotate", str(base), str(out), "--data", str(rows), "--max-length", "16", "--windows", "3"]
    assert main([*argv, "--json", str(tmp_path / "rotated.json")]) == 0
    assert json.loads((tmp_path / "rotated.json").read_text())["windows"] == 3
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out))
    ids = torch.arange(2, 14)[None]
    assert torch.allclose(before(ids).logits, after(ids).logits, atol=1e-4)
    reader = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(before.state_dict()[reader], after.state_dict()[reader], atol=1e-3)
    recipe["model"]["name_or_path"], recipe["atp"]["space"] = str(out), "values"
    assert main(["train", written(recipe, tmp_path)]) == 0
    blocks = json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())["atp"]["blocks"]
    assert sum(blocks["kept"]["value"]) < sum(blocks["full"]["value"])
    assert "exists: choose another name or give --overwrite" in refused(capsys, *argv)
    assert "--windows 0 is too few: give 1 or more" in refused(capsys, *argv, "--overwrite", "--windows", "0")
    assert "which would be replaced" in refused(capsys, "rotate", base, base, "--data", rows, "--overwrite")


def test_eval_measures_every_model(base, tmp_path, capsys):
    rows, out = tiny.jsonl(tmp_path / "rows.jsonl", range(6)), tmp_path / "eval.json"
    argv = ["eval", str(base), str(base), "--data", str(rows), "--max-length", "64", "--json", str(out)]
    assert main(argv) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == 6
    first, second = found["models"]
    assert first["perplexity"] == second["perplexity"]
    assert main([*argv, "--completion-only"]) == 0
    assert json.loads(out.read_text())["models"][0]["tokens"] < first["tokens"]
    assert "--completion is missing: give both" in refused(capsys, *argv, "--prompt", "{prompt}")


@pytest.mark.parametrize(
    "options",
    [
        ["train-step", "--rows", "2", "--length", "8", "--gradient-checkpointing"],
        ["run", "--rows", "2", "--length", "8", "--steps", "20"],
        ["infer", "--tokens", "8"],
        ["kernels", "--tokens", "8", "--space", "disp"],
        ["export"],
    ],
)
def test_bench_prints_and_writes_ratios(base, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setenv("COLUMNS", "100")
    table, out = tmp_path / "rows.csv", tmp_path / "rows.json"
    argv = ["bench", *options, "--config", str(base), "--layers", "2", "--round-to", "1", "--calls", "2"]
    assert main([*argv, "--csv", str(table), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed
    found = json.loads(out.read_text())["rows"]
    assert all(f"{row['case']} " in printed for row in found)  # none folded
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [row["case"] for row in found]
    assert {row["layers"] for row in rows} == {"2"}
    assert all(float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]) for row in rows)
    assert all(row[column] for row in rows for column in ("processor", "threads", "torch", "copy_gb_per_s"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "40"], "smollm2-135m has 30 blocks"),
        (["--calls", "0"], "--calls must be an integer >= 1"),
        (["--sparsity", "1.5"], "sparsity=1.5 is not allowed"),
        (["--config", "./nowhere"], "./nowhere: no such folder"),
        (["--csv", "/nowhere/rows.csv"], "--csv /nowhere/rows.csv: its folder does not exist"),
    ],
)
def test_bench_refuses_before_it_measures(capsys, options, message):
    assert message in refused(capsys, "bench", "infer", *options)


def test_bench_compiles_where_asked(base, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **_settings: compiled.append(call) or call)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    argv = [
        "bench",
        "infer",
        "--tokens",
        "8",
        "--config",
        str(base),
        "--layers",
        "2",
        "--round-to",
        "1",
        "--calls",
        "1",
    ]
    for options, models, said in (([], 0, "False"), (["--compile"], 2, "True")):
        assert main([*argv, *options, "--csv", str(tmp_path / "rows.csv")]) == 0
        assert len(compiled) == models
        with (tmp_path / "rows.csv").open() as table:
            assert {row["compile"] for row in csv.DictReader(table)} == {said}


def test_bench_refuses_kernels_where_there_are_none(base, capsys):
    options = ("--config", str(base), "--round-to", "1", "--rows", "1", "--length", "4", "--impl", "triton")
    assert "needs the package triton, and a GPU" in refused(capsys, "bench", "train-step", *options)


def test_shapes_are_those_of_the_models(capsys, tmp_path):
    """Parameter counts as the models' cards give them."""
    known = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "mistral-7b": 7_248_023_552}
    for name, parameters in known.items():
        assert main(["inspect", name, "--json", str(tmp_path / "inspect.json")]) == 0
        assert json.loads((tmp_path / "inspect.json").read_text())["parameters"] == parameters


def test_train_then_resume_then_export(recipe, tmp_path, capsys):
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path, "--atp.sparsity", "0.5", "--json", str(tmp_path / "results.json")]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics == json.loads((tmp_path / "results.json").read_text())
    assert metrics["pruning"]["sparsity_asked"] == 0.5
    assert metrics["validation"]["tokens"] > 0
    assert (run / "final" / "adapter_config.json").is_file()
    removed = metrics["pruning"]["prunable_parameters"] - metrics["pruning"]["kept_parameters"]
    assert metrics["pruned"]["parameters"] == sum(p.numel() for p in tiny.model().parameters()) - removed

    assert metrics["command"][:2] == ["atp", "train"]
    assert metrics["data"]["rows"] == {"train": 120, "validation": 20, "validation_windows": 23}  # three rows make two
    assert metrics["base"]["bytes"] == sum(f.stat().st_size for f in Path(recipe["model"]["name_or_path"]).iterdir())
    assert metrics["base"]["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert [sample["prompt"] for sample in metrics["samples"]] == [tiny.row(i)["prompt"] for i in (120, 126, 133)]

    assert "already holds a run" in refused(capsys, "train", path)
    assert json.loads((run / "metrics.json").read_text()) == metrics
    (run / "metrics.json").unlink()  # as where it was killed while it measured
    assert main(["train", path, "--atp.sparsity", "0.5", "--resume"]) == 0
    again = json.loads((run / "metrics.json").read_text())
    assert again["validation"]["nll"] == pytest.approx(metrics["validation"]["nll"], rel=1e-6)

    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--json", str(tmp_path / "export.json")]) == 0
    exported = json.loads((tmp_path / "export.json").read_text())
    assert exported["parameters_before"] - exported["parameters_after"] == removed
    assert "exists" in refused(capsys, "export", run, out)
    argv = ["eval", str(run / "pruned"), str(out), "--data", recipe["data"]["validation"]]
    assert main([*argv, "--json", str(tmp_path / "eval.json")]) == 0
    first, second = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert first["nll"] == pytest.approx(second["nll"], rel=1e-6)


def test_what_users_cannot_mend_is_not_printed(base):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["inspect", str(base)]) == 0
        get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear"))
    assert not [each for each in caught if "is_gradient_checkpointing" in str(each.message)]


def test_measuring_the_base_model_changes_nothing(base, recipe, tmp_path):
    recipe["atp"] = False
    for name, options in {"with": (), "without": ("--measure_base", "false")}.items():
        assert main(["train", written(recipe, tmp_path), "--output_dir", str(tmp_path / name), *options]) == 0
    metrics, without = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("with", "without"))
    assert metrics["validation"]["nll"] == without["validation"]["nll"]
    assert "base" not in without
    assert without["samples"][0]["base"] is None

    argv = ["eval", str(base), "--data", recipe["data"]["validation"], "--packing", "--max-length", "16"]
    assert main([*argv, "--json", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())["models"][0]
    assert metrics["base"]["validation"]["nll"] == pytest.approx(found["nll"], rel=1e-6)


def test_the_seed_is_the_adapters_too(recipe, tmp_path):
    recipe |= {"atp": False, "measure_base": False}
    recipe["training"] |= {"max_steps": 1, "learning_rate": 0.0}
    for name, seed in {"a": "1", "b": "1", "c": "2"}.items():
        options = ("--output_dir", str(tmp_path / name), "--training.seed", seed)
        assert main(["train", written(recipe, tmp_path), *options]) == 0
    a, b, c = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "lora_A" in key)


def test_formats_of_an_export(recipe, tmp_path, capsys, monkeypatch):
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    measured = json.loads((run / "metrics.json").read_text())["validation"]["perplexity"]
    card = ModelCard.load(run / "pruned" / "README.md")
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [
        ("validation.jsonl", round(measured, 4))
    ]
    assert str(tmp_path) not in str(card)

    out, found = tmp_path / "adapter", tmp_path / "found.json"
    assert main(["export", str(run), str(out), "--format", "adapter", "--json", str(found)]) == 0
    after = json.loads(found.read_text())["parameters_after"]
    assert after == json.loads((run / "metrics.json").read_text())["pruned"]["parameters"]
    assert {f.name for f in out.iterdir()} == {"base", "adapter"}
    assert ModelCard.load(out / "adapter" / "README.md").data.eval_results[0].metric_value == round(measured, 4)
    assert "an adapter without a decision" in refused(capsys, "export", out, tmp_path / "again")

    def write_gguf(folder, out, dtype, *, overwrite):
        asked.append((sorted(f.name for f in Path(folder).iterdir()), dtype, overwrite))
        Path(out).write_bytes(b"GGUF")
        return Path(out)

    asked = []
    monkeypatch.setitem(sys.modules, "atp.export.gguf", SimpleNamespace(write_gguf=write_gguf))
    file = tmp_path / "model.gguf"
    assert main(["export", str(run), str(file), "--format", "gguf", "--dtype", "q8_0", "--json", str(found)]) == 0
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(asked[0][0])
    assert asked[0][1:] == ("q8_0", False)
    results = json.loads(found.read_text())
    assert (results["bytes"], results["dtype"], results["parameters_after"]) == (4, "q8_0", after)
    assert main(["export", str(run / "pruned"), str(file), "--format", "gguf", "--overwrite"]) == 0
    assert asked[1][1:] == ("f16", True)
    assert not list(tmp_path.glob(".model.gguf*"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old").write_bytes(b"mine")
    assert main(["export", str(run), str(tmp_path / "mine"), "--overwrite"]) == 0
    assert not (tmp_path / "mine" / "old").exists()
    assert not list(tmp_path.glob(".*.old"))
    for source, out in ((run / "final", run), (run / "final", run / "final"), (run, run / "final"), (run, tmp_path)):
        assert "which would be replaced" in refused(capsys, "export", source, out, "--overwrite")
    shutil.copytree(run / "final", run / "checkpoint-9")
    assert main(["export", str(run / "checkpoint-9"), str(tmp_path / "earlier")]) == 0
    cards = [(folder / "README.md").read_text() for folder in (run / "pruned", tmp_path / "earlier")]
    assert ["perplexity" in card for card in cards] == [True, False], "results are those of the run's end"
    assert (run / "recipe.yaml").exists()
    assert "exists" in refused(capsys, "export", run, file, "--format", "gguf")
    assert "ends in .gguf" in refused(capsys, "export", run, tmp_path / "out", "--format", "gguf")
    assert "--dtype q8_0 is for --format gguf" in refused(capsys, "export", run, tmp_path / "out", "--dtype", "q8_0")
    adapter = ("--format", "adapter", "--dtype", "f16")
    assert "--dtype is not for --format adapter" in refused(capsys, "export", run, tmp_path / "out", *adapter)
    assert main(["export", str(run), str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    whole, half = (load_file(folder / "model.safetensors") for folder in (run / "pruned", tmp_path / "half"))
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert "invalid choice: 'onnx'" in refused(capsys, "export", run, tmp_path / "out", "--format", "onnx")
    assert "no final/adapter_config.json" in refused(capsys, "export", run / "pruned", tmp_path / "out")


def test_the_folder_of_a_run_is_no_model_and_a_file_no_folder_to_export_to(recipe, tmp_path, capsys):
    recipe["training"]["max_steps"] = 2
    assert main(["train", written(recipe, tmp_path)]) == 0
    run, mine = tmp_path / "run", tmp_path / "mine.txt"
    for folder in (run, run / "final"):
        line = refused(capsys, "eval", folder, "--data", recipe["data"]["validation"])
        assert f"{folder} is of a run, and no model: give {run / 'pruned'}" in line
    mine.write_text("kept")
    assert f"{mine} is a file, no folder" in refused(capsys, "export", run, mine, "--overwrite")
    assert mine.read_text() == "kept"


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(recipe, tmp_path, capsys, monkeypatch):
    def missing():
        raise RuntimeError("Tracker requires tracker to be installed")

    monkeypatch.setattr("atp.commands.train.get_reporting_integration_callbacks", lambda _: [missing])
    recipe["model"]["name_or_path"] = "./none"
    assert "training: Tracker requires tracker" in refused(capsys, "train", written(recipe, tmp_path))


def test_a_run_that_is_refused_to_go_on_keeps_its_recipe(recipe, tmp_path):
    path, kept = written(recipe, tmp_path), tmp_path / "run" / "recipe.yaml"
    assert main(["train", path]) == 0
    before = kept.read_text()
    assert main(["train", path, "--resume", "--atp.sparsity", "0.3"]) == 2
    assert kept.read_text() == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model.dtype", "bfloat16", "model.dtype: float32 there, bfloat16 now"),
        ("--lora.lora_alpha", "64", "lora.lora_alpha: 32 there, 64 now"),
        ("--lora.r", "2", "lora.r: "),
        ("--data.max_length", "8", "data.max_length: "),
        ("--atp", "false", "atp: True there, False now"),
    ],
)
def test_a_run_goes_on_with_its_own_recipe_only(recipe, tmp_path, capsys, option, value, message):
    recipe["training"]["max_steps"] = 2
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    (run / "metrics.json").unlink()
    before = (run / "recipe.yaml").read_text()
    assert message in refused(capsys, "train", path, "--resume", option, value)
    assert (run / "recipe.yaml").read_text() == before


def test_what_is_measured_may_change_while_a_run_goes_on_and_what_was_begun_is_removed(recipe, tmp_path):
    recipe["training"]["max_steps"] = 2
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    (run / "metrics.json").unlink()
    (run / ".pruned.99.tmp").mkdir()
    assert main(["train", path, "--resume", "--data.validation_windows", "2"]) == 0
    assert not (run / ".pruned.99.tmp").exists()


def test_a_run_goes_on_at_the_intervals_that_it_is_given_now(recipe, tmp_path):
    recipe["training"] |= {"max_steps": 6, "save_steps": 2, "save_total_limit": None, "logging_steps": 1}
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    for folder in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(run / folder)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "pruned")
    assert main(["train", path, "--resume", "--training.save_steps", "3", "--training.logging_steps", "2"]) == 0
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-6"}
    logged = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line.get("log", {})] == [1, 2, 4, 6]
    assert Recipe.from_yaml(run / "recipe.yaml").training["logging_steps"] == 2
    assert "logging_steps: 2\n" in (run / "recipe.yaml").read_text()


def test_overwrite_removes_what_the_last_run_left(recipe, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-99", "recovered", ".recovered.unfinished"):
        (run / name).mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    (run / "mine.txt").write_text("kept")
    recipe["training"]["max_steps"] = 2
    assert main(["train", written(recipe, tmp_path), "--overwrite"]) == 0
    assert not any((run / name).exists() for name in ("checkpoint-99", "recovered", ".recovered.unfinished"))
    assert (run / "mine.txt").read_text() == "kept"
    assert "training" in json.loads((run / "metrics.json").read_text())


def test_a_finished_run_is_not_gone_on_with(recipe, tmp_path, capsys):
    path = written(recipe, tmp_path)
    assert main(["train", path]) == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert "holds a finished run: nothing is left to go on with" in refused(capsys, "train", path, "--resume")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    (tmp_path / "run" / "metrics.json").unlink()  # as where measuring was cut
    assert main(["train", path, "--resume"]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_overwrite_takes_links_away_and_leaves_what_they_point_to(recipe, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert main(["train", written(recipe, tmp_path)]) == 0
    (run / "final").rename(elsewhere)
    (run / "final").symlink_to(elsewhere)
    (tmp_path / "mine.yaml").write_text("by: hand")
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").symlink_to(tmp_path / "mine.yaml")
    assert main(["train", written(recipe, tmp_path), "--overwrite"]) == 0
    assert not (run / "final").is_symlink()
    assert (elsewhere / "adapter_config.json").is_file()
    assert (tmp_path / "mine.yaml").read_text() == "by: hand"
    assert Recipe.from_yaml(run / "recipe.yaml")


@pytest.mark.parametrize("option", ["", "--overwrite"])
def test_an_interrupted_run_says_how_to_go_on(recipe, tmp_path, capsys, monkeypatch, option):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("atp.commands.train.base_model", interrupted)
    assert main(["train", written(recipe, tmp_path), *([option] if option else [])]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the same again with --resume" in line
    assert ("in place of --overwrite" in line) == bool(option)


@pytest.mark.parametrize("pruned", [True, False])
def test_a_checkpoint_that_a_kill_left_unfinished_is_set_aside(recipe, tmp_path, capsys, pruned):
    recipe["training"]["max_steps"] = 4
    recipe["atp"] = recipe.get("atp", {}) if pruned else False
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    unfinished = run / "checkpoint-4" / "trainer_state.json"
    unfinished.write_bytes(unfinished.read_bytes()[:-10])
    assert main(["train", path, "--resume"]) == 0
    assert (run / "_unfinished-checkpoint-4").is_dir()
    assert json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_truncated_checkpoint_is_refused_and_the_one_before_resumes(recipe, tmp_path, capsys, name):
    recipe["training"]["max_steps"] = 4
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    damaged = run / "checkpoint-4" / name
    damaged.write_bytes(damaged.read_bytes()[:-10])
    line = refused(capsys, "train", path, "--resume")
    assert "checkpoint-4" in line
    assert "to go on from the one before" in line
    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", path, "--resume"]) == 0


def test_a_full_disk_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run"))

    monkeypatch.setattr("atp.commands.train.Recipe.from_yaml", full)
    line = refused(capsys, "train", written(recipe, tmp_path))
    assert line.endswith("the disk is full: free some space, then run again with --resume")
    monkeypatch.setattr(errno, "ENOSPC", errno.EDQUOT)  # as `full` says it: a quota that is used up
    assert line == refused(capsys, "train", written(recipe, tmp_path))
    monkeypatch.setattr("atp.commands.history._runs", full)
    line = refused(capsys, "history", str(tmp_path))
    assert line.endswith("the disk is full: free some space, then run the same again")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_disk_that_is_full_when_torch_saves_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("atp.commands.train.Recipe.from_yaml", lambda *_: torch.save(torch.zeros(9999), "/dev/full"))
    line = refused(capsys, "train", written(recipe, tmp_path))
    assert line.endswith("a checkpoint: the disk is full: free some space, then run again with --resume")


def test_a_path_that_the_system_refuses_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/x")

    monkeypatch.setattr("atp.commands.train.Recipe.from_yaml", closed)
    line = refused(capsys, "train", written(recipe, tmp_path))
    assert line == "atp: /closed/x: Permission denied: check the path, and that it may be read and written"


def test_two_runs_do_not_write_to_one_folder(recipe, tmp_path, capsys):
    path, run = written(recipe, tmp_path), tmp_path / "run"
    run.mkdir()
    with FileLock(run / ".lock"):
        for how in ([], ["--resume"], ["--overwrite"]):
            assert f"another atp train is running in {run}" in refused(capsys, "train", path, *how)
        assert [p.name for p in run.iterdir()] == [".lock"]
    assert main(["train", path]) == 0


def test_a_file_system_without_locks_keeps_nobody_out(recipe, tmp_path, monkeypatch):
    def none(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", none)
    assert main(["train", written(recipe, tmp_path)]) == 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_tilde_is_the_home_folder_in_recipes_and_after_an_equals_sign(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = recipe["data"]
    data["train"] = data["train"].replace(str(tmp_path), "~")
    data["validation"] = [data["validation"].replace(str(tmp_path), "~")]
    recipe["output_dir"] = "~/mine"
    monkeypatch.chdir(tmp_path)
    assert main(["train", written(recipe, tmp_path), "--json=~/re=sults.json"]) == 0
    assert (tmp_path / "mine" / "metrics.json").read_bytes() == (tmp_path / "re=sults.json").read_bytes()
    assert not (tmp_path / "~").exists()
    assert main(["export", "~/mine", "~/exported"]) == 0
    assert (tmp_path / "exported" / "config.json").is_file()
    assert "nothing is left to go on with" in refused(capsys, "train", written(recipe, tmp_path), "--resume")


def test_results_are_written_where_the_terminal_lacks_letters_of_a_path(recipe, tmp_path, monkeypatch):
    recipe["output_dir"] = str(tmp_path / "r\u00e9\u6f22")
    with io.TextIOWrapper(io.BytesIO(), encoding="latin-1") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["train", written(recipe, tmp_path), "--json", str(tmp_path / "results.json")]) == 0
        terminal.flush()
        assert b"r\xe9\\u6f22" in terminal.buffer.getvalue()
    assert (tmp_path / "results.json").is_file()


def test_resuming_where_nothing_is_says_that_it_begins(recipe, tmp_path, caplog):
    assert main(["train", written(recipe, tmp_path), "--resume"]) == 0
    assert f"{tmp_path / 'run'} holds nothing to go on from" in caplog.text


def test_a_run_that_was_stopped_before_its_page_says_how_to_make_it(recipe, tmp_path, capsys):
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    (run / "report.html").unlink()
    assert refused(capsys, "train", path, "--resume").endswith(f"its page is missing: atp report {run} writes it")
    assert main(["report", str(run)]) == 0
    assert "its page is missing" not in refused(capsys, "train", path, "--resume")


def test_a_run_that_ended_without_checkpoints_is_not_trained_again_by_resume(recipe, tmp_path, capsys):
    recipe["training"]["save_strategy"] = "no"
    path, run = written(recipe, tmp_path), tmp_path / "run"
    assert main(["train", path]) == 0
    before = (run / "metrics.json").read_bytes()
    line = refused(capsys, "train", path)
    assert "already holds a run: give --overwrite" in line
    assert "no checkpoint to go on from" in refused(capsys, "train", path, "--resume")
    assert (run / "metrics.json").read_bytes() == before
    line = refused(capsys, "train", path, "--model.name_or_path", run / "pruned", "--overwrite")
    assert "which would be replaced" in line
    assert (run / "pruned" / "model.safetensors").is_file()


def test_of_several_gpus_one_process_takes_one(recipe, tmp_path, caplog, monkeypatch):
    arguments = Recipe.training_arguments

    def seeing_two(self):
        training = arguments(self)
        training._n_gpu = 2
        return training

    monkeypatch.setattr(Recipe, "training_arguments", seeing_two)
    assert main(["train", written(recipe, tmp_path)]) == 0
    assert "one of 2 GPUs: start it with accelerate launch" in caplog.text


@pytest.mark.parametrize(
    ("asked", "kind", "said"), [("true", "MULTI_CPU", 1), ("true", "MULTI_GPU", 0), ("false", "MULTI_CPU", 0)]
)
def test_fsdp_that_accelerate_leaves_out_is_told(caplog, monkeypatch, asked, kind, said):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    state = SimpleNamespace(distributed_type=DistributedType(kind))
    _say_that_nothing_is_sharded(SimpleNamespace(distributed_state=state))
    assert len(caplog.messages) == said


def test_a_run_in_parts_that_exports_nothing_is_measured_by_what_it_has_saved(recipe, tmp_path, monkeypatch):
    """Of the processes that hold parts only the first measures."""
    recipe["atp"]["export"] = False
    ran = []
    monkeypatch.setattr("atp.commands.results._is_in_parts", lambda model: not ran.append(model))
    measured = []

    def seen(model, windows):
        measured.append(model)
        return perplexity(model, windows)

    monkeypatch.setattr("atp.commands.results.perplexity", seen)
    assert main(["train", written(recipe, tmp_path)]) == 0
    (masked,), (_, loaded) = ran, measured  # the base model comes first
    assert loaded is not masked
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]["perplexity"] > 0


@pytest.mark.parametrize("fills", ["perplexity", "continuation"])
def test_a_run_that_has_no_room_to_be_measured_is_complete_all_the_same(fills, recipe, tmp_path, caplog, monkeypatch):
    """What has been measured before there was none is kept."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    recipe["measure_base"] = False
    monkeypatch.setattr(f"atp.commands.results.{fills}", full)
    assert main(["train", written(recipe, tmp_path)]) == 0
    assert "is complete, but there was no room on the GPU to measure all of the model" in caplog.text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["pruning"]["sparsity"] == pytest.approx(0.4, abs=0.05)
    assert metrics["pruned"]["bytes"] > 0
    assert ("validation" in metrics) == (fills == "continuation")
    assert {sample["result"] for sample in metrics["samples"]} == {None}
    assert (tmp_path / "run" / "pruned" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--atp.sparcity", "0.5"], "atp: unknown setting 'sparcity': did you mean 'sparsity'?"),
        (["--training.max_step=5"], "did you mean 'max_steps'?"),
        (["--lora.rank", "8"], "lora: unknown setting 'rank'"),
        (["--data.packin", "false"], "did you mean 'packing'?"),
        (["--moddel.dtype", "float32"], "did you mean 'model'?"),
        (["--atp.sparsity", "1.5"], "sparsity=1.5 is not allowed"),
        (["--atp.sparsity", "much"], "atp: sparsity='much' is of the wrong type: it must be float"),
        (["--training.max_steps", "many"], "training: max_steps='many' is of the wrong type: it must be int"),
        (["--training.learning_rate", "fast"], "learning_rate='fast' is of the wrong type"),
        (["--training.eval_strategy", "sometimes"], "training: "),
        (["--training.per_device_train_batch_size", "0"], "per_device_train_batch_size=0 is not allowed"),
        (["--training.gradient_accumulation_steps", "-1"], "gradient_accumulation_steps=-1 is not allowed"),
        (["--training.dataloader_num_workers", "-1"], "dataloader_num_workers=-1 is not allowed"),
        (["--training.seed", "-1"], "seed=-1 is not allowed: it must be an integer in [0, 2^32)"),
        (["--training.warmup_steps", ".nan"], "warmup_steps=nan is not allowed"),
        (["--training.adam_beta1", "2"], "adam_beta1=2 is not allowed: it must be a number in [0, 1)"),
        (["--training.num_train_epochs", "-1"], "num_train_epochs=-1 is not allowed: it must be a number above 0"),
        (["--training.max_steps", "0"], "max_steps=0 is not allowed: it must be an integer above 0, or -1"),
        (["--training.resume_from_checkpoint", "x"], "resume_from_checkpoint is not allowed: atp train --resume"),
        (["--lora.inference_mode", "true"], "inference_mode=True would leave nothing to train"),
        (["--lora", "false"], "recipe: `lora` must be a mapping of settings, found False"),
        (["--atp", "0"], "recipe: `atp` must be a mapping of settings, found 0"),
        (["--data.train", "[]"], "train=[] is not allowed: it must be a file or hub name, or a list of them"),
        (["--training.metric_for_best_model", "f1"], "metric_for_best_model=f1 is not allowed"),
        (["--training.output_dir", "x"], "output_dir is set at the top"),
        (["--model.dtype", "int8"], "dtype='int8' is not allowed"),
        (["--model.name_or_path", "./nowhere"], "./nowhere: no such folder"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data.max_length", "100000"], "do not fill one window"),
        (["--output_dir.x", "1"], "'output_dir' is not a section"),
        (["--atp.sparsity"], "a value is missing"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_train_refuses_bad_settings_in_one_line(recipe, tmp_path, capsys, overrides, message):
    assert message in refused(capsys, "train", written(recipe, tmp_path), *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.eval_strategy", "steps", "--data.validation", "null"], "training: "),
        (["--training.report_to", "nobody"], "training: "),
        (["--lora.r", "0"], "lora: "),
        (["--lora.target_modules", "[nowhere]"], "lora: "),
    ],
)
def test_what_peft_and_the_trainer_refuse_is_one_line(recipe, tmp_path, capsys, overrides, message):
    """After the model's weights have been loaded."""
    assert main(["train", written(recipe, tmp_path), *overrides]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"atp: {message}")
    assert not (tmp_path / "run").exists()


def test_train_refuses_rows_shared_with_validation(recipe, tmp_path, capsys):
    recipe["data"]["validation"] = str(tiny.jsonl(tmp_path / "shared.jsonl", range(119, 125)))
    assert "1 row(s) are in both the training and the validation set" in refused(
        capsys, "train", written(recipe, tmp_path)
    )


def test_other_commands_refuse_bad_input_in_one_line(base, tmp_path, capsys):
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(3))
    assert "no such folder" in refused(capsys, "inspect", tmp_path / "none")
    assert "sparsity=2.0 is not allowed" in refused(capsys, "inspect", base, "--sparsity", 2)
    assert "no such GGUF file" in refused(capsys, "inspect", base, "--gguf-file", "x.gguf")
    assert "is a file" in refused(capsys, "inspect", rows)
    assert "no such file" in refused(capsys, "eval", base, "--data", tmp_path / "none.jsonl")
    assert "--max-length must be" in refused(capsys, "eval", base, "--data", rows, "--max-length", 1)
    assert "final/adapter_config.json" in refused(capsys, "export", tmp_path, tmp_path / "out")
    assert "its folder does not exist" in refused(capsys, "inspect", base, "--json", tmp_path / "none" / "x.json")
    assert "is a folder: name a file in it" in refused(capsys, "inspect", base, "--json", tmp_path)
    assert "invalid choice: 'inspekt'" in refused(capsys, "inspekt")
    assert "required" in refused(capsys)
    assert "unrecognized arguments: --verbose" in refused(capsys, "inspect", base, "--verbose")


def test_what_runs_in_one_process_is_refused_in_several(base, capsys, monkeypatch):
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "atp inspect runs in one process: start it without a launcher" in refused(capsys, "inspect", base)
    assert "cannot be read" in refused(capsys, "train", base / "nowhere.yaml")


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ATPError, match="cannot be written"):
        write_json(tmp_path / "none" / "results.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_are_written_to_where_a_link_points_and_into_what_is_no_file(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    for value in (1, 2):
        write_json(tmp_path / "link.json", {"a": value})
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "there.json").read_text()) == {"a": value}
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_json(tmp_path / "pipe", {"a": 3})
        assert json.loads(read.result(timeout=10)) == {"a": 3}
    assert (tmp_path / "pipe").is_fifo()


def test_results_on_standard_output_stand_among_what_else_is_printed(base, tmp_path):
    with (tmp_path / "printed").open("w") as printed:
        words = [sys.executable, "-m", "atp", "inspect", str(base), "--json", "/dev/stdout"]
        assert subprocess.run(words, stdout=printed, check=False).returncode == 0
    found = (tmp_path / "printed").read_text()
    assert "prunable" in found[: found.index('"prunable_parameters"')], "the table before it"
    assert json.loads(found[found.index("\n{") :])["parameters"] > 0


def test_results_on_a_standard_output_that_is_captured_are_among_what_is_printed(base):
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["inspect", str(base), "--json", "/dev/stdout"]) == 0
    found = printed.getvalue()
    assert json.loads(found[found.index("\n{") :])["parameters"] > 0


def test_a_folder_is_replaced_where_a_link_points(tmp_path, monkeypatch):
    (tmp_path / "large" / "old").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large")
    with written_beside(tmp_path / "link") as fresh:
        (fresh / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["large", "large/new", "link"]
    monkeypatch.chdir(tmp_path / "large")
    with written_beside(Path(".")) as fresh:
        (fresh / "newer").touch()
    assert [p.name for p in (tmp_path / "large").iterdir()] == ["newer"]


def test_places_that_cannot_be_written_are_one_line_before_any_work(recipe, base, tmp_path, capsys, monkeypatch):
    path, file = written(recipe, tmp_path), tmp_path / "file"
    file.touch()
    monkeypatch.setattr("atp.commands.train.base_model", None)  # nothing is loaded
    says = f"{file} is a file, no folder: choose another place"
    assert says in refused(capsys, "train", path, "--output_dir", file)
    assert says in refused(capsys, "train", path, "--output_dir", file / "run")
    assert says in refused(capsys, "compare", path, "--out", file)
    assert says in refused(capsys, "export", base, file / "out")
    (tmp_path / "link").symlink_to(file / "out")
    assert f"{file} is a file, no folder" in refused(capsys, "export", base, tmp_path / "link")
    assert "link is a link to" in refused(capsys, "train", path, "--output_dir", tmp_path / "link")
    assert "File name too long: choose another place" in refused(capsys, "train", path, "--output_dir", "x" * 300)
    closed, stat = tmp_path / "closed", os.stat
    closed.mkdir()

    def refusing(place, *args, **kwargs):
        if str(place).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(place, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).startswith(str(closed)))
    says = f"nothing can be written to {closed}: choose another place"
    assert says in refused(capsys, "train", path, "--output_dir", closed / "run")
    assert says in refused(capsys, "inspect", base, "--json", closed / "x.json")
    monkeypatch.setattr("os.access", lambda place, _: Path(place) != tmp_path)
    assert f"nothing can be written to {tmp_path}" in refused(capsys, "train", path)


def test_every_command_in_the_readmes_parses():
    names = "train|recover|export|eval|generate|rotate|inspect|plan|compare|report|history|bench"
    text = README.read_text() + (README.parent / "configs" / "README.md").read_text().replace("\\\n", "")
    commands = re.findall(rf"(?:^    |-m )(atp (?:{names}) [^#\n]+)", text, re.M)
    assert {command.split()[1] for command in commands} == set(names.split("|"))
    for command in commands:
        words = shlex.split(command)[1:]
        arguments, overrides = build_parser(words).parse_known_args(words)
        assert not overrides or arguments.takes_overrides, command


def test_python_in_the_readme_compiles():
    (snippet,) = re.findall(r"```python\n(.+?)```", README.read_text(), re.S)
    compile(snippet, "README.md", "exec")
