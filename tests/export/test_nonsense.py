"""Folders whose config, indices or file names are nonsense, or lead elsewhere.

Oracle: one line, of the right class, from `atp.load` and from the modelling file alone; no tensor of a size that a
config asks for without the weights having it.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from atp import load
from atp.errors import CheckpointError
from tests.export.cases import exported

BLOCKS = {
    "negative": ("kept", "mlp", [-1, 20]),
    "more_than_there_were": ("kept", "mlp", [10**12, 20]),
    "a_float": ("kept", "mlp", [1.5, 20]),
    "a_bool": ("kept", "mlp", [True, 20]),
    "text": ("kept", "mlp", "ab"),
    "too_few_blocks": ("kept", "kv", [1]),
    "no_group": ("full", "mlp", [0, 0]),
    "groups_without_end": ("full", "mlp", [10**12, 10**12]),
    "no_such_linear": ("linears", "mlp.nothing", {"rows": "mlp"}),
    "no_linear": ("linears", "mlp", {"rows": "mlp"}),
    "no_such_side": ("linears", "mlp.up_proj", {"up": "mlp"}),
    "no_such_kind": ("linears", "mlp.up_proj", {"rows": "heads"}),
    "no_norm": ("norms", "mlp.up_proj", "mlp"),
    "no_selection": ("selections", "mlp", ["mlp", "mlp"]),
    "no_container": ("container", None, "model.__class__"),
    "no_list": ("container", None, "lm_head"),
    "no_attention": ("attention", None, "../attention"),
    "no_bias": ("biases", None, ["mlp"]),
    "no_kinds": ("kept", None, 7),
}


def copied(space, tmp_path):
    return shutil.copytree(exported("llama", space).folder, tmp_path / "folder")


def configured(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(folder, match):
    for opening, error in ((load, CheckpointError), (AutoModelForCausalLM.from_pretrained, ValueError)):
        with pytest.raises(error, match=match) as caught:
            opening(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BLOCKS)
def test_a_layout_that_does_not_fit_is_refused(case, tmp_path):
    name, key, value = BLOCKS[case]

    def change(values):
        blocks = values["atp"]["blocks"]
        blocks[name] = value if key is None else blocks[name] | {key: value}

    refused(configured(copied("width", tmp_path), change), r"config\.json: atp\.blocks")


@pytest.mark.parametrize("entry", [None, {}, [], 7, {"blocks": None}])
def test_a_config_without_a_layout_is_refused(entry, tmp_path):
    folder = configured(copied("width", tmp_path), lambda values: values.update(atp=entry))
    refused(folder, r"atp\.blocks is not a layout")


@pytest.mark.parametrize("names", [None, [], ["forward"], ["PrunedTrainer"], ["PrunedLlamaConfig"], "PrunedLlama"])
def test_a_class_that_is_no_pruned_model_is_refused(names, tmp_path):
    folder = configured(copied("width", tmp_path), lambda values: values.update(architectures=names))
    refused(folder, "names no pruned model")


CHANGES = {
    "beyond": lambda index: index + 40,
    "negative": lambda index: index - 30,
    "twice": torch.zeros_like,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("space", "name", "size"),
    [
        ("disp", "mlp.residual_in", 48),
        ("disp", "mlp.residual_out", 48),
        ("values", "self_attn.value_rows", 24),
        ("values", "self_attn.value_columns", 48),
    ],
)
def test_dimensions_that_there_are_not_are_refused(space, name, size, change, tmp_path):
    folder = copied(space, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    path = f"model.layers.1.{name}"
    tensors[path] = CHANGES[change](tensors[path])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, rf"layers\.1\.{re.escape(name)} is missing or holds no ascending dimensions below {size}")


@pytest.mark.parametrize("path", ["self_attn.v_proj", "self_attn.o_proj"])
def test_values_that_no_layer_gives_or_takes_are_refused(path, tmp_path):
    def change(values):
        values["atp"]["blocks"]["linears"].pop(path)

    refused(configured(copied("values", tmp_path), change), r"config\.json: atp\.blocks: the (rows|cols) of 'value'")


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/stolen.safetensors", "stolen.bin", 7])
def test_an_index_that_leads_elsewhere_is_refused(name, tmp_path):
    folder = copied("uniform", tmp_path)
    shutil.move(folder / "model.safetensors", tmp_path / "stolen.safetensors")
    names = load_file(tmp_path / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no weight file of this folder"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 7}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    folder = copied("uniform", tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = copied("uniform", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="export the model again"):
        load(folder)


@pytest.mark.parametrize("size", ["wide", -4])
def test_sizes_that_are_none_are_one_line(size, tmp_path):
    folder = configured(copied("uniform", tmp_path), lambda values: values.update(hidden_size=size))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
