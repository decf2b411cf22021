"""`atp recover`, in this process, on a tiny run. Oracles: exit status, files left, models as a stranger loads them."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atp.cli import INTERRUPTED, main
from atp.errors import UnsupportedModelError
from tests import tiny
from tests.recovery.interruption import cut_at_the_third
from tests.test_cli import refused

SMALL = ("--length", "16", "--windows", "12", "--held-out-windows", "6", "--batch-size", "4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that `atp train` has finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("recover")
    recipe = {
        "model": {"name_or_path": str(tiny.folder(folder / "base")), "dtype": "float32"},
        "data": {
            "train": str(tiny.jsonl(folder / "train.jsonl", range(120))),
            "validation": str(tiny.jsonl(folder / "validation.jsonl", range(120, 160))),
            "max_length": 16,
        },
        "lora": {"r": 4},
        "atp": {"sparsity": 0.4, "calibration_rows": 4, "calibration_batch_size": 2, "compensate": "none"},
        "training": {"max_steps": 12, "learning_rate": 5.0e-3, "save_strategy": "no", "disable_tqdm": True},
        "measure_base": False,
        "output_dir": str(folder / "run"),
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "tiny.yaml")]) == 0
    return folder / "run"


def recover(*argv):
    return main(["recover", *map(str, argv), *SMALL])


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_recovered_folder_is_one_like_pruned_with_better_weights(finished, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--learning-rate", "1e-3", "--epochs", "4", "--no-keep-best", "--json", tmp_path / "results.json")
    assert recover(finished, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert "kept: 4 of 4 blocks were changed" in printed
    assert {file.name for file in out.iterdir()} == {f.name for f in (finished / "pruned").iterdir()} | {
        "recovery.json"
    }
    found = json.loads((out / "recovery.json").read_text())
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert (found["method"], found["settings"]["epochs"]) == ("br+gp", 4)
    assert found["data"]["calibration"]["windows"] == 12
    assert found["data"]["held_out"]["tokens"] == 6 * 16
    assert found["data"]["other"] is None
    first, last = found["blocks"][0], found["blocks"][-1]
    assert first["block"] == 0
    assert last["after"]["calibration"]["relative"] < last["before"]["calibration"]["relative"]
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (finished / "pruned", out))
    assert type(old) is type(new)
    assert not same(weights(finished / "pruned"), weights(out))
    assert [p.shape for p in old.parameters()] == [p.shape for p in new.parameters()]
    card = ModelCard.load(out / "README.md")
    perplexity = found["overall"]["after"]["held_out"]["perplexity"]
    assert f"{perplexity:.4g}"[:4] in card.text
    assert "recovery" in card.text
    assert "train.jsonl" in card.text, "what the run was trained on"
    assert "learning_rate" in card.text
    assert not list(tmp_path.glob(".out*"))


def test_what_is_no_better_is_rolled_back_and_said(finished, tmp_path, capsys):
    out = tmp_path / "out"
    assert recover(finished, "--out", out, "--learning-rate", "1e20", "--epochs", "1") == 0
    printed = capsys.readouterr().out
    assert "rolled back: held-out perplexity has not become better" in printed
    assert same(weights(finished / "pruned"), weights(out))
    assert json.loads((out / "recovery.json").read_text())["overall"]["kept"] is False
    assert "recovery:" not in (out / "README.md").read_text()


def test_biases_are_fitted_where_they_are_asked_for_and_gone_where_rolled_back(finished, tmp_path):
    out, undone = tmp_path / "out", tmp_path / "undone"
    assert recover(finished, "--out", out, "--method", "lr", "--no-keep-best", "--biases") == 0
    new = set(weights(out)) - set(weights(finished / "pruned"))
    assert {name.rsplit(".", 2)[-2] for name in new} == {"o_proj", "down_proj"}
    assert any(weights(out)[name].abs().max() > 0 for name in new)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.atp["parameters"]["after"] == model.num_parameters()
    argv = (finished, "--out", undone, "--biases", "--learning-rate", "1e20", "--epochs", "1")
    assert recover(*argv) == 0
    assert same(weights(finished / "pruned"), weights(undone))
    assert json.loads((out / "recovery.json").read_text())["settings"]["biases"] is True


def test_another_teacher_and_other_text(finished, tmp_path):
    other = tiny.jsonl(tmp_path / "other.jsonl", range(200, 240))
    argv = (finished, "--out", tmp_path / "out", "--method", "lr", "--teacher", finished.parent / "base")
    assert recover(*argv, "--other", other) == 0
    found = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert found["teacher"] == str(finished.parent / "base")
    assert found["blocks"][0]["after"].keys() == {"calibration", "held_out", "other"}
    assert found["overall"]["before"].keys() == {"held_out", "other"}
    assert "epochs" not in found["settings"]


def test_tasks_are_scored_before_and_after(finished, tmp_path):
    pytest.importorskip("lm_eval")
    task = tiny.jsonl(tmp_path / "cases.jsonl", range(300, 304))
    argv = (finished, "--out", tmp_path / "out", "--method", "lr", "--no-keep-best", "--tasks", task)
    assert recover(*argv) == 0
    found = json.loads((tmp_path / "out" / "recovery.json").read_text())["tasks"]
    assert found["before"]["cases"]["rows"] == found["after"]["cases"]["rows"] == 4


def test_an_interrupted_recovery_is_gone_on_with(finished, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert recover(finished, "--out", whole, "--epochs", "2") == 0
    calls = cut_at_the_third(monkeypatch)
    assert recover(finished, "--out", cut, "--epochs", "2") == INTERRUPTED
    assert capsys.readouterr().err.endswith(
        "interrupted: run the same again with --resume to go on from what it has saved\n"
    )
    assert not cut.exists()
    argv = ("recover", finished, "--out", cut, *SMALL)
    assert "holds an interrupted recovery: give --resume to go on" in refused(capsys, *argv, "--epochs", "2")
    assert "was left with another settings" in refused(capsys, *argv, "--epochs", "3", "--resume")
    assert "another dtype" in refused(capsys, *argv, "--epochs", "2", "--resume", "--dtype", "bfloat16")
    other = shutil.copytree(finished, tmp_path / "other")
    shutil.copytree(tmp_path / ".cut.unfinished", tmp_path / ".else.unfinished")
    again = ("recover", other, "--out", tmp_path / "else", *SMALL, "--epochs", "2", "--resume")
    assert "weights" in refused(capsys, *again), "of a run that has been trained anew"
    shutil.rmtree(tmp_path / ".else.unfinished")
    assert recover(finished, "--out", cut, "--epochs", "2", "--resume") == 0
    assert len(calls) == 5  # the third again, the fourth, and no other twice
    assert same(weights(whole), weights(cut))
    assert not list(tmp_path.glob(".cut*"))


def test_an_interrupted_recovery_that_was_to_replace_another_is_gone_on_with(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert recover(finished, "--out", out, "--epochs", "1") == 0
    before = weights(out)
    cut_at_the_third(monkeypatch)
    assert recover(finished, "--out", out, "--epochs", "2", "--overwrite") == INTERRUPTED
    assert same(weights(out), before)
    assert recover(finished, "--out", out, "--epochs", "2", "--resume") == 0
    assert json.loads((out / "recovery.json").read_text())["settings"]["epochs"] == 2
    assert "exists: give --overwrite" in refused(capsys, "recover", finished, "--out", out, *SMALL, "--resume")


def test_what_is_refused_once_models_are_loaded_leaves_nothing_to_go_on_with(finished, tmp_path, capsys, monkeypatch):
    def refuse(_):
        raise UnsupportedModelError("no biases here")

    monkeypatch.setattr("atp.commands.recover.add_writer_biases", refuse)
    assert recover(finished, "--out", tmp_path / "out", "--biases") == 2
    assert "no biases here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_recovery_is_gone_on_with(finished, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--epochs", "40", "--no-keep-best")
    assert recover(finished, "--out", whole, *options) == 0
    command = [sys.executable, "-m", "atp", "recover", *map(str, (finished, "--out", cut)), *SMALL, *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / ".cut.unfinished" / "window_0001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not cut.exists()
    assert recover(finished, "--out", cut, *options, "--resume") == 0
    assert same(weights(whole), weights(cut))
    assert not list(tmp_path.glob(".cut*"))


def test_bad_input(finished, tmp_path, capsys):
    def says(*argv):
        return refused(capsys, "recover", *argv)

    out = ("--out", tmp_path / "out")
    assert "give the output folder of a finished run" in says(tmp_path, *out)
    assert "no exported model here: give --pruned" in says(finished, *out, "--pruned", tmp_path)
    assert "epochs=0 is not allowed" in says(finished, *out, "--epochs", 0)
    assert "--windows 0 is not allowed" in says(finished, *out, "--windows", 0)
    for place in (finished / "pruned", finished / "final", finished, finished.parent):
        assert "which would be replaced" in says(finished, "--out", place, "--overwrite")
    assert "no exported model here" in says(finished, *out, "--pruned", finished / "checkpoint-2")
    texts = tmp_path / "texts"
    texts.mkdir()
    for option in ("--data", "--held-out", "--other", "--tasks"):
        file = tiny.jsonl(texts / "rows.jsonl", range(4))
        assert "which would be replaced" in says(finished, "--out", texts, "--overwrite", option, file)
    assert "which would be replaced" in says(finished, "--out", texts, "--overwrite", "--tasks", f"mine={file}")
    assert "exists: give --overwrite" in says(finished, "--out", finished / "pruned")
    train, held_out = (finished.parent / f"{name}.jsonl" for name in ("train", "validation"))
    assert "are in both the calibration and the held-out set" in says(finished, *out, "--held-out", train, *SMALL)
    assert "are in both the calibration and the held-out set" in says(finished, *out, "--data", held_out, *SMALL)
    assert "are in both the calibration and the train set" in says(finished, *out, "--tasks", train, *SMALL)
    bare = tmp_path / "bare"
    shutil.copytree(finished / "final", bare / "final")
    base = ("--base", finished.parent / "base", "--pruned", finished / "pruned")
    assert "no recipe that names calibration text: give --data" in says(bare, *out, *base)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".out*"))
