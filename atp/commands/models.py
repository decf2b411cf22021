"""Loading what a user names: a hub name, a folder, or a GGUF file, with one-line errors where that fails."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atp.commands.shapes import SHAPES, config_of
from atp.errors import ATPError, ConfigError, ModelError, UnsupportedModelError


def load_model(
    name: str, gguf_file: str | None = None, dtype: str = "auto", bits: int | None = None
) -> PreTrainedModel:
    """The causal LM called `name`, on the CPU, in `dtype` (a GGUF is dequantised, `auto` meaning float32).

    Args:
        bits: 4 or 8 for linear layers quantised by bitsandbytes, on this process's GPU if there is one.

    Raises:
        ModelError: where nothing loadable is there.
        ConfigError: where `bits` needs a package that is not installed.
    """
    name, gguf_file = _split_gguf(name, gguf_file)
    arguments: dict[str, Any] = {"dtype": dtype}
    if bits is not None:
        arguments["quantization_config"] = _quantised(bits, dtype)
    if gguf_file:
        arguments = {
            "gguf_file": gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": "float32" if dtype == "auto" else dtype,
        }
    return _load(AutoModelForCausalLM, name, "model", arguments)


def _quantised(bits: int, dtype: str) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"load_in_{bits}bit needs bitsandbytes: pip install 'atp[quantized]'")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    computes_in = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computes_in,
    )


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: where nothing loadable is there.
    """
    name, gguf_file = _split_gguf(name, gguf_file)
    tokenizer = _load(AutoTokenizer, name, "tokenizer", {"gguf_file": gguf_file} if gguf_file else {})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return _from_config(name, config, best_device(), getattr(torch, dtype))


def _config(name: str, gguf_file: str | None = None) -> PretrainedConfig:
    if name in SHAPES and not Path(name).exists():
        return config_of(name)
    name, gguf_file = _split_gguf(name, gguf_file)
    return _load(AutoConfig, name, "model config", {"gguf_file": gguf_file} if gguf_file else {})


def _from_config(name: str, config: PretrainedConfig, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {_first_line(error)}") from None


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


def _split_gguf(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    if gguf_file is None and name.endswith(".gguf"):
        return str(Path(name).parent), Path(name).name
    return name, gguf_file


def _load(loader: Any, name: str, what: str, arguments: dict[str, Any]) -> Any:
    path = Path(name)
    gguf_file = arguments.get("gguf_file")
    if path.is_file():
        raise ModelError(f"{name} is a file: give its folder, or a file ending in .gguf")
    if gguf_file and (path.is_dir() or name.startswith((".", "/"))) and not (path / gguf_file).is_file():
        raise ModelError(f"{path / gguf_file}: no such GGUF file: check the path")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{name}: no such folder: check the path")
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **arguments)
    except ATPError:
        raise
    except Exception as error:  # loaders raise OSError, ValueError, KeyError, safetensors and hub errors alike
        raise ModelError(
            f"{name}: the {what} cannot be loaded, check the name and the network: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
