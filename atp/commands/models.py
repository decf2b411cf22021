"""Models that need no weights of their own: shells from a config, random ones, and the device they go to."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel

from atp.commands.shapes import SHAPES, config_of
from atp.errors import ConfigError, UnsupportedModelError, in_one_line
from atp.evaluation import folder_bytes
from atp.export import register
from atp.models import auto_class, load_config, split_gguf, text_model
from atp.structure.families import keep_blocks

register()  # a model that a command names may be one that we exported


def load_shell(name: str, gguf_file: str | None = None, dtype: str | None = None) -> PreTrainedModel:
    """The model's modules without weights (meta device): enough to discover, and nothing large is downloaded.

    Args:
        name: one of `SHAPES`, a hub name, a folder, or a GGUF file.
    """
    return _from_config(name, _config(name, gguf_file), "meta", getattr(torch, dtype) if dtype else None)


def random_model(name: str, layers: int | None = None, dtype: str = "float32") -> PreTrainedModel:
    """A model with random weights, on the accelerator if there is one.

    Args:
        name: as `load_shell` takes it.
        layers: as many of its blocks; None means all.
    """
    config = _config(name)
    if layers is not None:
        text = config.get_text_config()
        if layers > text.num_hidden_layers:
            raise ConfigError(f"{name} has {text.num_hidden_layers} blocks: ask for no more than those, not {layers}")
        keep_blocks(text, range(layers))
    return _from_config(name, config, best_device(), getattr(torch, dtype))


def _config(name: str, gguf_file: str | None = None) -> PretrainedConfig:
    if name in SHAPES and not Path(name).exists():
        return config_of(name)
    name, gguf_file = split_gguf(name, gguf_file)
    return load_config(name, gguf_file)


def _from_config(name: str, config: PretrainedConfig, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    try:
        with torch.device(device):
            return text_model(auto_class(config).from_config(config, dtype=dtype))
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {in_one_line(error)}") from None


def best_device() -> str:
    """The accelerator if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_in_bf16() -> bool:
    """Whether bfloat16 is arithmetic here and not emulated, 5 to 8 times slower on a CPU without AVX-512."""
    if torch.accelerator.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def to_best_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move the model to the accelerator if there is one."""
    return model.to(best_device())


def bytes_of(name: str, gguf_file: str | None) -> int | None:
    """Of the folder, the GGUF file, or what the hub's cache has of a name; None where it has nothing."""
    folder, file = split_gguf(name, gguf_file)
    if not Path(folder).is_dir():
        try:
            folder = snapshot_download(folder, local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    path = Path(folder) / file if file else Path(folder)
    return folder_bytes(path) if path.is_dir() else path.stat().st_size if path.is_file() else None
