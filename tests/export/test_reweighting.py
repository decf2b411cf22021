"""An exported folder written again with other weights. Oracle: the folder itself, and the model it was loaded from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from atp.errors import CheckpointError, UnsupportedModelError
from atp.export import load
from atp.export.reweighting import add_writer_biases, write_reweighted
from tests import families
from tests.export.cases import exported

CASES = [("llama", "width"), ("llama_tied", "uniform"), ("gemma3", "disp"), ("gpt_neox", "width")]


@pytest.mark.parametrize(("family", "space"), CASES)
def test_the_same_weights_give_the_same_folder(tmp_path, family, space):
    source = exported(family, space).folder
    write_reweighted(source, load(source), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(("family", "space"), CASES)
def test_other_weights_are_what_is_loaded(tmp_path, family, space):
    source = exported(family, space).folder
    model = load(source).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    write_reweighted(source, model, tmp_path)
    assert torch.equal(families.logits(load(tmp_path).eval()), families.logits(model))


@pytest.mark.parametrize(("family", "space"), [("llama", "width"), ("gpt_neox", "width"), ("gemma3", "depth")])
def test_writers_have_the_biases_they_were_given(tmp_path, family, space):
    source = exported(family, space).folder
    model = load(source).eval()
    before = families.logits(model)
    add_writer_biases(model)
    assert torch.equal(families.logits(model), before)
    generator = torch.Generator().manual_seed(0)
    writers = [m for n, m in model.named_modules() if n.endswith(("o_proj", "down_proj", "dense", "dense_4h_to_h"))]
    with torch.no_grad():
        for bias in (writer.bias for writer in writers if isinstance(writer, torch.nn.Linear)):
            bias += torch.rand(bias.shape, generator=generator)
    write_reweighted(source, model, tmp_path)
    again = load(tmp_path).eval()
    assert torch.equal(families.logits(again), families.logits(model))
    assert not torch.equal(families.logits(again), before)
    assert again.config.atp["parameters"]["after"] == again.num_parameters()


def test_plain_models_have_no_place_for_biases():
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a plain model .* export without 'uniform'"):
        add_writer_biases(load(exported("llama", "uniform").folder))


def test_a_folder_of_another_model_is_refused(tmp_path):
    source = exported("llama", "width").folder
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match="has another shape than the model's"):
        write_reweighted(source, families.build("llama"), tmp_path / "out")
    save_file({"foreign": torch.zeros(1)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match="foreign is no tensor of the model"):
        write_reweighted(tmp_path / "in", load(source), tmp_path / "out")
