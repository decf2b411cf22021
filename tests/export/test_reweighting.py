"""An exported folder written again with other weights. Oracle: the folder itself, and the model it was loaded from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from atp.errors import CheckpointError
from atp.export import load
from atp.export.reweighting import write_reweighted
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


def test_a_folder_of_another_model_is_refused(tmp_path):
    source = exported("llama", "width").folder
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    with pytest.raises(CheckpointError, match="has another shape than the model's"):
        write_reweighted(source, families.build("llama"), tmp_path / "out")
    save_file({"foreign": torch.zeros(1)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match="foreign is no tensor of the model"):
        write_reweighted(tmp_path / "in", load(source), tmp_path / "out")
