"""An exported folder again, with other values in the same tensors: its config, tokenizer and modelling file stay.

Writers may have got biases meanwhile, where the folder's modelling file has a place for them; its config says so then.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import CheckpointError, UnsupportedModelError
from atp.files import write_json
from atp.structure.discovery import is_ragged
from atp.structure.families import WRITERS
from atp.weights import weight_files, write_weights

_CONFIG = "config.json"


def add_writer_biases(model: PreTrainedModel) -> None:
    """Give every writer (o_proj, down_proj) of an exported model a bias of zeros, where it has none.

    Raises:
        UnsupportedModelError: where the model is one of its family's own, which has no place for them.
    """
    if not is_ragged(model.config):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a plain model of its family, which has no place for biases that others lack: "
            "leave them out, or export without 'uniform'"
        )
    layout = model.config.atp["blocks"]
    added = set(layout.get("biases", ()))
    for block in model.get_submodule(layout["container"]):
        for path, writer in block.named_modules():
            if path in WRITERS and isinstance(writer, nn.Linear) and writer.bias is None:
                writer.bias = nn.Parameter(writer.weight.new_zeros(writer.out_features))
                added.add(path)
    layout["biases"] = sorted(added)


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
    plan |= _added_biases(source, folder, model, tensors)

    def make(name: str) -> Tensor:
        if tensors[name].shape != plan[name].shape:
            raise CheckpointError(f"{source}: {name} has another shape than the model's: export the model again")
        return tensors[name]

    write_weights(folder, plan, make)


def _added_biases(source: Path, folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases that `source` has not, as empty tensors; `folder`'s config is told of them."""
    config: dict[str, Any] = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    now = model.config.atp["blocks"]["biases"] if is_ragged(model.config) else []
    layout = config["atp"]["blocks"] if now else {}
    new = tuple(f".{path}.bias" for path in set(now) - set(layout.get("biases", ())))
    if not new:
        return {}
    added = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items() if name.endswith(new)}
    layout["biases"] = now
    config["atp"]["parameters"]["after"] += sum(tensor.numel() for tensor in added.values())
    write_json(folder / _CONFIG, config)
    return added


def _dtype(tensors: dict[str, Tensor], name: str, source: Path) -> torch.dtype:
    if name not in tensors:
        raise CheckpointError(f"{source}: {name} is no tensor of the model that was loaded from it: export it again")
    return tensors[name].dtype
