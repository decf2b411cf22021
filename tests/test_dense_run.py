"""`atp: false`: plain LoRA. Oracles: the adapter loaded again and measured; the trainable side counted by hand."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atp.cli import main
from atp.commands import train
from atp.commands.datasets import load_data
from atp.errors import ConfigError
from atp.evaluation import perplexity
from atp.recipe import Recipe
from tests import tiny

MINIMAL = {"model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}, "output_dir": "runs/x"}


def test_dense_run_leaves_an_adapter_and_measures_the_tuned_model(tmp_path):
    base = tiny.folder(tmp_path / "base")
    recipe = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "train": str(tiny.jsonl(tmp_path / "train.jsonl", range(120))),
            "validation": str(tiny.jsonl(tmp_path / "validation.jsonl", range(120, 140))),
            "max_length": 16,
            "validation_windows": 5,
            "tasks": {"finding": str(tiny.jsonl(tmp_path / "task.jsonl", range(140, 150)))},
            "task_rows": 3,
        },
        "lora": {"r": 4},
        "atp": False,
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert not (run / "pruned").exists()
    assert "pruning" not in metrics
    assert metrics["tuned"]["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert metrics["tuned"]["prefill"]["latency_ms"] > 0
    assert metrics["tuned"]["decode"]["latency_ms_per_token"] > 0
    assert metrics["training"]["train_runtime"] > 0
    assert (metrics["training"]["peak_memory_mib"] or 1) > 0

    score = metrics["tasks"]["finding"]
    assert (score["metric"], score["rows"]) == ("rougeL", 3)
    assert 0 <= score["value"] <= 1

    untuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    windows = load_data(Recipe.from_yaml(path).data, tiny.tokenizer(), progress=False).validation
    assert metrics["validation"]["tokens"] == 5 * 15
    before = perplexity(untuned, windows).nll
    tuned = PeftModel.from_pretrained(untuned, str(run / "final"))
    assert metrics["validation"]["nll"] == pytest.approx(perplexity(tuned, windows).nll, rel=1e-5)
    assert metrics["validation"]["nll"] < before


def test_a_dense_run_resumed_where_it_ended_is_the_same(tmp_path):
    """As where its measuring was cut."""
    recipe = MINIMAL | {
        "model": {"name_or_path": str(tiny.folder(tmp_path / "base")), "dtype": "float32"},
        "data": {"train": str(tiny.jsonl(tmp_path / "train.jsonl", range(120))), "max_length": 16},
        "atp": False,
        "training": {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 0
    before = (run / "final" / "adapter_model.safetensors").read_bytes()
    (run / "metrics.json").unlink()
    assert main(["train", str(path), "--resume"]) == 0
    assert (run / "final" / "adapter_model.safetensors").read_bytes() == before
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert "train_loss" not in json.loads((run / "metrics.json").read_text())["training"]


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bf16_is_named_before_anything_is_loaded(native, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(train, "computes_in_bf16", lambda: native)
    values = MINIMAL | {"model": {"name_or_path": "./none"}, "training": {"bf16": True}, "output_dir": str(tmp_path)}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 2, "there is no model called m"
    assert ("--training.bf16 false is several times faster here" in caplog.text) is not native


def test_false_survives_the_round_trip_and_the_command_line(tmp_path):
    recipe = Recipe.from_dict(MINIMAL | {"atp": False})
    assert recipe.atp is None
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    path.write_text(yaml.safe_dump(MINIMAL | {"atp": {"sparsity": 0.3}}))
    assert Recipe.from_yaml(path, ["--atp", "false"]).atp is None
    path.write_text(recipe.to_yaml())
    with pytest.raises(ConfigError, match="'atp' is not a section"):
        Recipe.from_yaml(path, ["--atp.sparsity", "0.5"])
    with pytest.raises(ConfigError, match="`atp` must be a mapping"):
        Recipe.from_dict(MINIMAL | {"atp": True})
