"""Reading a Hugging Face folder a tensor at a time, its shapes checked against what its config builds."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from atp.errors import CheckpointError, in_one_line
from atp.weights import weight_files

_ALSO_CALLED = {"lm_head.weight": "embed_out.weight"}
"""What `save_pretrained` writes for a state-dict name (GPT-NeoX)."""


class Source:
    """A folder's config and tensors.

    Attributes:
        config: as transformers reads it.
        shapes: of every tensor of the model, by state-dict name; a head tied to the embedding is not among them.

    Raises:
        CheckpointError: where the folder cannot be read, or its tensors are not those of its config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _config(folder)
        self.shapes = _shapes(self.config, folder)
        found = _stored_shapes(folder)
        self._stored = {name: name if name in found else _ALSO_CALLED.get(name, name) for name in self.shapes}
        self._files = {name: found[stored][0] for name, stored in self._stored.items() if stored in found}
        self._check({stored: shape for stored, (_, shape) in found.items()})

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype that the file has.

        Raises:
            CheckpointError: where it cannot be read.
        """
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(self._stored[name])
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def _check(self, found: dict[str, tuple[int, ...]]) -> None:
        for name, shape in self.shapes.items():
            stored = found.get(self._stored[name])
            if stored is None:
                raise CheckpointError(f"{self.folder}: no tensor {name}: export the model again")
            if stored != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {stored} where config.json says {shape}: export the model again"
                )


def _config(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: pass one that atp.export or save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be read ({in_one_line(error)}): export the model again"
        ) from None


def _shapes(config: PreTrainedConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):  # not `from_config`: under ZeRO-3 all processes would have to call it
            model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no model can be built from config.json ({in_one_line(error)})") from None
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _stored_shapes(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and shape of every stored tensor."""
    found = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    found[name] = (path, tuple(file.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return found


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: weights cannot be read ({in_one_line(error)}): export the model again")
