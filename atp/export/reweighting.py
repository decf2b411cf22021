"""An exported folder again, with other values in the same tensors: its config, tokenizer and modelling file stay."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from atp.errors import CheckpointError
from atp.weights import weight_files, write_weights


def write_reweighted(source: Path, model: PreTrainedModel, folder: Path) -> None:
    """Write what `source` holds into `folder`, which exists, with the weights of `model`, which was loaded from it.

    Raises:
        CheckpointError: where `source` cannot be read, or a tensor of its is not the model's, or has another shape.
    """
    files = weight_files(source)
    skipped = {file.name for file in files} | {"model.safetensors.index.json"}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in skipped:
            shutil.copyfile(file, folder / file.name)
    tensors = model.state_dict()
    plan: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                shape = opened.get_slice(name).get_shape()
                plan[name] = torch.empty(shape, dtype=_dtype(tensors, name, source), device="meta")

    def make(name: str) -> Tensor:
        if tensors[name].shape != plan[name].shape:
            raise CheckpointError(f"{source}: {name} has another shape than the model's: export the model again")
        return tensors[name]

    write_weights(folder, plan, make)


def _dtype(tensors: dict[str, Tensor], name: str, source: Path) -> torch.dtype:
    if name not in tensors:
        raise CheckpointError(f"{source}: {name} is no tensor of the model that was loaded from it: export it again")
    return tensors[name].dtype
