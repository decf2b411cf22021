"""Commands on the second device, one after the other, on one tiny model. Oracle: that they do what they are asked."""

import json

import pytest

from atp.bench import timing
from atp.cli import main
from tests import tiny
from tests.device import in_its_own_process

pytestmark = in_its_own_process

RECIPE = """
model: {{name_or_path: {base}}}
data: {{train: {train}, validation: {held_out}, max_length: 32, validation_windows: 4}}
lora: {{r: 4, lora_alpha: 8, target_modules: all-linear}}
atp: {{sparsity: 0.4, round_to: 1, calibration_rows: 8, refit_rows: 16}}
training: {{max_steps: 12, per_device_train_batch_size: 2, learning_rate: 1.0e-3, bf16: false, logging_steps: 4,
  save_strategy: "no", use_cpu: false, gradient_checkpointing: {checkpointing}, dataloader_pin_memory: false}}
output_dir: {run}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Model and text, made on the CPU."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "base": tiny.folder(folder / "base"),
        "train": tiny.jsonl(folder / "train.jsonl", range(200)),
        "held_out": tiny.jsonl(folder / "held_out.jsonl", range(200, 240)),
    }


def recipe(tmp_path, files, checkpointing="false"):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(**files, run=tmp_path / "run", checkpointing=checkpointing))
    return path


def done(*words):
    assert main([str(word) for word in words]) == 0


def test_train_eval_recover_and_export(files, device, tmp_path):
    run = tmp_path / "run"
    done("train", recipe(tmp_path, files))
    assert (run / "pruned" / "model.safetensors").exists()
    done("eval", files["base"], run / "pruned", "--data", files["held_out"], "--max-length", 32)
    done("export", run, tmp_path / "again")
    text = ("--length", 32, "--windows", 8, "--held-out-windows", 4, "--epochs", 1)
    for method in ("lr+br+gp+cr", "br+gp"):
        done("recover", run, *text, "--method", method, "--overwrite", "--json", tmp_path / "recovered.json")
        assert len(json.loads((tmp_path / "recovered.json").read_text())["blocks"]) == 4


def test_train_with_gradient_checkpointing(files, device, tmp_path):
    done("train", recipe(tmp_path, files, checkpointing="true"))


BENCHES = {
    "infer": ("--tokens", 8, "--written", 2),
    "train-step": ("--rows", 2, "--length", 8),
    "export": (),
    "kernels": ("--tokens", 8),
}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """A GPU's would take a CPU minutes."""
    monkeypatch.setattr(timing, "_MATMUL_ON_GPU", 64)
    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 20)


def bench(files, name, *options):
    done("bench", name, "--config", files["base"], "--round-to", 1, *options)


@pytest.mark.parametrize("space", ["width", "disp"])
@pytest.mark.parametrize("name", BENCHES)
def test_bench(files, device, name, space):
    bench(files, name, "--calls", 1, "--space", space, *BENCHES[name])


def test_bench_of_a_whole_run(files, device):
    bench(files, "run", "--rows", 2, "--length", 8, "--steps", 40, "--calls", 2)
