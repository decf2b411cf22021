"""Weights written tensor by tensor. Oracles: the tensors, read by safetensors; transformers' own `save_pretrained`."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from atp.errors import UnsupportedModelError
from atp.weights import write_weights
from tests.export.cases import CASES, exported

TENSORS = {
    "a.weight": torch.randn(7, 3),
    "a.bias": torch.randn(3).to(torch.bfloat16),
    "b.half": torch.randn(2, 2, 5).half().transpose(0, 2),
    "b.scalar": torch.tensor(1.5, dtype=torch.float64),
    "c.index": torch.arange(9),
    "c.empty": torch.zeros(0, 4),
    "d.flags": torch.tensor([True, False]),
}


def written(folder, max_shard_size):
    plan = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}
    write_weights(folder, plan, TENSORS.__getitem__, max_shard_size)
    return sorted(folder.iterdir())


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def test_one_file_holds_every_tensor(tmp_path):
    [file] = written(tmp_path, "1GB")
    assert file.name == "model.safetensors"
    assert same(load_file(file), TENSORS)


def test_shards_and_their_index_hold_every_tensor(tmp_path):
    *shards, index = written(tmp_path, 100)
    assert len(shards) > 1
    found = json.loads(index.read_text())
    by_name = {name: load_file(tmp_path / file)[name] for name, file in found["weight_map"].items()}
    assert same(by_name, TENSORS)
    assert {path.name for path in shards} == set(found["weight_map"].values())
    assert found["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_every_tensor_is_aligned_to_its_size(tmp_path):
    [file] = written(tmp_path, "1GB")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0, name


def test_a_dtype_that_files_do_not_have_is_named(tmp_path):
    plan = {"a.weight": torch.empty(2, dtype=torch.float8_e4m3fn, device="meta")}
    with pytest.raises(UnsupportedModelError, match=r"a\.weight: torch\.float8_e4m3fn"):
        write_weights(tmp_path, plan, plan.__getitem__)


def test_no_tensor_is_made_before_the_last_one_is_gone(tmp_path):
    alive = weakref.WeakSet()

    def make(name):
        assert not alive
        tensor = torch.full((4, 4), float(len(name)))
        alive.add(tensor)
        return tensor

    plan = {name: torch.empty(4, 4, device="meta") for name in ("a", "bb", "ccc")}
    write_weights(tmp_path, plan, make)
    assert load_file(tmp_path / "model.safetensors")["ccc"].unique().item() == 3


@pytest.mark.parametrize(("family", "space"), CASES)
def test_names_and_dtypes_are_those_that_save_pretrained_gives(family, space, tmp_path):
    case = exported(family, space)
    case.loaded.save_pretrained(tmp_path)
    assert same(*(load_file(folder / "model.safetensors") for folder in (case.folder, tmp_path)))
