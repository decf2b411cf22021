"""`atp.load` of a run, and going on from it.

Oracle: the live masked model that the run ended with.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import LlamaForCausalLM

from atp import export, load
from atp.cli import main
from atp.commands.about import about_run
from atp.errors import CheckpointError, ConfigError, ModelError
from atp.export import export_adapter
from atp.layers import attachment_of
from atp.loading import base_of, load_dense
from atp.recipe import ModelSettings
from tests import families, runs, tiny

IDS = torch.arange(2, 26).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, the model it ended with, and the folder of its base model."""
    folder = tmp_path_factory.mktemp("run")
    tiny.model().save_pretrained(folder / "base")
    run = runs.trainer(folder / "run", runs.config(sparsity=0.3, refit_rows=8), base=folder / "base")
    run.train()
    return folder / "run", run.model.eval(), folder / "base"


def test_a_run_loads_as_the_model_it_ended_with(finished):
    folder, live, _ = finished
    for path in (folder, folder / "final"):
        model = load(path).eval()
        assert isinstance(model, PeftModel)
        assert families.relative_error(logits(model), logits(live)) <= 1e-6
    decision = attachment_of(live).decision()
    assert all(torch.equal(mask, decision[name]) for name, mask in attachment_of(model).decision().items())


def test_the_dense_model_of_a_run_is_its_base_and_its_adapter_with_nothing_pruned(finished):
    folder, live, base = finished
    dense = load_dense(folder).eval()
    assert isinstance(dense, LlamaForCausalLM)
    assert attachment_of(dense) is None
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder / "final").eval()
    assert families.relative_error(logits(dense), logits(tuned)) <= 1e-5
    assert families.relative_error(logits(dense), logits(live)) > 1e-3
    with pytest.raises(CheckpointError, match="give the output folder of a finished run"):
        load_dense(folder / "pruned")


def test_training_goes_on_under_the_same_decision(finished, tmp_path):
    model = load(finished[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    decision = attachment_of(model).decision()
    runs.trainer(tmp_path, None, model=model, max_steps=3).train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(torch.equal(mask, decision[name]) for name, mask in attachment_of(model).decision().items())
    exported = load(export(model, tmp_path / "out")).eval()
    assert isinstance(exported, LlamaForCausalLM)
    assert families.relative_error(logits(exported), logits(model.eval())) <= 1e-5


def test_a_moved_base_is_asked_for(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    base = shutil.copytree(finished[2], tmp_path / "moved")
    settings = json.loads((run / "final" / "adapter_config.json").read_text())
    (run / "final" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere"}))
    with pytest.raises(ModelError, match="/nowhere: no such folder"):
        load(run)
    assert families.relative_error(logits(load(run, base=str(base)).eval()), logits(finished[1])) <= 1e-6


def test_a_base_of_other_weights_is_refused(finished, tmp_path):
    other = tiny.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    for read in (load, load_dense):
        with pytest.raises(CheckpointError, match="was tuned on a model of other weights than .*other: give base"):
            read(finished[0], base=str(tmp_path / "other"))


def test_a_run_without_pruning_loads_without_masks(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "final" / "atp")
    model = load(run)
    assert attachment_of(model) is None
    assert any(p.requires_grad for p in model.parameters())


def test_an_adapter_export_loads_where_it_has_been_moved_to(finished, tmp_path):
    folder = export_adapter(finished[1], tmp_path / "out").rename(tmp_path / "moved")
    model = load(folder)
    assert attachment_of(model) is None
    assert any(p.requires_grad for p in model.parameters())
    assert families.relative_error(logits(model.eval()), logits(finished[1])) <= 1e-5


@pytest.mark.parametrize("damage", ["missing", "truncated", "config", "state"])
def test_a_damaged_run_is_one_line(finished, tmp_path, damage):
    final = shutil.copytree(finished[0] / "final", tmp_path / "final")
    weights = final / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (final / "adapter_config.json").write_text("{")
    else:
        (final / "atp" / "state.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load(final)
    assert "\n" not in str(caught.value)


def test_arguments_that_do_not_fit_are_refused(finished):
    with pytest.raises(ConfigError, match="device_map is not allowed"):
        load(finished[0], device_map="cpu")
    with pytest.raises(ConfigError, match="no run's folder"):
        load(finished[0] / "pruned", base="x")
    with pytest.raises(CheckpointError, match="not a folder"):
        load(finished[0] / "nothing")
    assert load(finished[0], dtype="bfloat16").get_base_model().dtype == torch.bfloat16


def test_a_run_of_two_adapters_is_not_taken_for_one_of_them(tmp_path, caplog):
    model = runs.peft_model()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    tiny.model().save_pretrained(tmp_path / "base")
    runs.trainer(tmp_path / "run", runs.config(), model=model, max_steps=2).train()
    assert "the run cannot be loaded again" in caplog.text
    with pytest.raises(CheckpointError, match="ended with the adapters default, second"):
        load(tmp_path / "run", base=str(tmp_path / "base"))


def test_an_adapter_that_is_there_but_not_active_is_no_part_of_the_run(tmp_path, caplog):
    """As TRL's DPO keeps a reference."""
    model = runs.peft_model()
    model.add_adapter("ref", model.peft_config["default"])
    tiny.model().save_pretrained(tmp_path / "base")
    run = runs.trainer(tmp_path / "run", runs.config(), model=model, max_steps=2)
    run.train()
    assert "cannot be loaded again" not in caplog.text
    loaded = load(tmp_path / "run", base=str(tmp_path / "base")).eval()
    assert families.relative_error(logits(loaded), logits(run.model.eval())) <= 1e-6


def test_a_base_that_is_given_is_loaded_as_the_recipe_says(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    recipe = {
        "model": {"name_or_path": "/nowhere", "dtype": "bfloat16", "load_in_4bit": True},
        "data": {"train": "rows.jsonl"},
        "output_dir": str(run),
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert base_of(run / "final", "/moved") == ModelSettings("/moved", dtype="bfloat16", load_in_4bit=True)
    recipe["model"] = {"name_or_path": "/folder", "gguf_file": "old.gguf", "dtype": "float16"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert base_of(run / "final", None, "new.gguf") == ModelSettings("/folder", "new.gguf", dtype="float16")
    assert base_of(run / "final", "/moved") == ModelSettings("/moved", dtype="float16")


def test_the_recipe_is_found_from_within_the_folder_of_the_adapter(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished[0], tmp_path / "run")
    recipe = {"model": {"name_or_path": "/base", "dtype": "bfloat16"}, "data": {"train": "x"}, "output_dir": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(run / "final")
    assert base_of(Path(".")) == ModelSettings("/base", dtype="bfloat16")
    assert about_run(Path("."), base_of(Path("."))).data == ("x",)


def test_a_base_is_loaded_plain_where_that_is_asked_for(finished, tmp_path):
    run, base = shutil.copytree(finished[0], tmp_path / "run"), str(finished[2])
    recipe = {"model": {"name_or_path": base, "load_in_4bit": True}, "data": {"train": "x"}, "output_dir": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plain = load_dense(run, base=base, plain=True)
    (run / "recipe.yaml").unlink()
    assert torch.equal(logits(plain), logits(load_dense(run, base=base)))


def test_a_gguf_file_in_a_folder_is_not_replaced_by_what_is_made_of_it(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    model = {"name_or_path": str(tmp_path), "gguf_file": "base.gguf"}
    recipe = {"model": model, "data": {"train": "x"}, "output_dir": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "base.gguf").touch()
    words = ["export", str(run), str(tmp_path / "base.gguf"), "--format", "gguf", "--overwrite"]
    assert main(words) == 2
    assert "base.gguf, which would be replaced" in capsys.readouterr().err
