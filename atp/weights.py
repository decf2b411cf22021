"""Files of weights: which a folder has, and writing them a tensor at a time, so that saving needs no second model.

The files are those of `save_pretrained`: `NAME.safetensors`, or shards of it and their index. The format: the header's
length (8 bytes, little-endian), the header (JSON: dtype, shape and bytes from-to of every tensor), and the bytes.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm.auto import tqdm

from atp.errors import CheckpointError, UnsupportedModelError, in_one_line

MAX_SHARD_SIZE = "50GB"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def weight_files(folder: Path) -> list[Path]:
    """The files that `save_pretrained` leaves: one, or those that an index names, all in the folder itself.

    Raises:
        CheckpointError: where the index cannot be read, or names what is no weight file of the folder.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        return [single]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({in_one_line(error)}): export the model again") from None
    for file in names:
        if not (isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")):
            raise CheckpointError(f"{index}: {file!r} is no weight file of this folder: export the model again")
    return [single] if single.is_file() else [folder / file for file in sorted(names)]


def write_weights(
    folder: Path | None,
    plan: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    name: str = "model",
) -> None:
    """Write the tensors named in `plan` into `folder`.

    Args:
        folder: None where another process writes and this one helps `make`.
        plan: what is to be written, on the meta device.
        make: gives a tensor by name, of the shape and dtype in `plan`; called once each, in an order that depends on
            nothing but `plan`.
        name: of the file.

    Raises:
        UnsupportedModelError: naming a tensor whose dtype the format does not have.
    """
    if unknown := [name for name, tensor in plan.items() if tensor.dtype not in _DTYPES]:
        raise UnsupportedModelError(f"{unknown[0]}: {plan[unknown[0]].dtype} cannot be written: convert it first")
    pattern = f"{name}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(dict(plan), filename_pattern=pattern, max_shard_size=max_shard_size)
    with tqdm(total=len(plan), desc="atp: writing weights", leave=False, delay=2, disable=folder is None) as progress:
        for filename, tensors in split.filename_to_tensors.items():
            tensors = sorted(tensors, key=lambda tensor: -plan[tensor].element_size())  # all are aligned, then
            with (Path(os.devnull) if folder is None else folder / filename).open("wb") as file:
                file.write(_header({tensor: plan[tensor] for tensor in tensors}))
                for tensor in tensors:
                    _write(file, make(tensor), plan[tensor])
                    progress.update()
    if split.is_sharded and folder is not None:
        parameters = sum(tensor.numel() for tensor in plan.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.safetensors.index.json").write_text(text, "utf-8")


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: Tensor, planned: Tensor) -> None:
    if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
        raise CheckpointError(f"a tensor is {tuple(tensor.shape)} where {tuple(planned.shape)} was said: report this")
    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
