"""Loading what a user names: a hub name, a folder, or a GGUF file, with one-line errors where that fails."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atp.errors import ATPError, ConfigError, ModelError, UnsupportedModelError, in_one_line

_OF_QUANTISED = {"hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"}
"""What loading notes on a quantised model."""

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' 4-bit layers."""


def load_model(
    name: str, gguf_file: str | None = None, dtype: str = "auto", bits: int | None = None
) -> PreTrainedModel:
    """The causal LM called `name` (or its text part), on the CPU, in `dtype`.

    A GGUF is dequantised, `auto` meaning float32.

    Args:
        bits: 4 or 8 for linear layers quantised by bitsandbytes, on this process's GPU if there is one.

    Raises:
        ModelError: where nothing loadable is there.
        ConfigError: where `bits` needs a package that is not installed.
        UnsupportedModelError: where the text part is no causal LM by itself.
    """
    name, gguf_file = split_gguf(name, gguf_file)
    arguments: dict[str, Any] = {"dtype": dtype}
    if bits is not None:
        arguments["quantization_config"] = _quantised(bits, dtype)
    if gguf_file:
        arguments = {
            "gguf_file": gguf_file,
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": "float32" if dtype == "auto" else dtype,
        }
    loader = AutoModelForCausalLM if gguf_file else auto_class(load_config(name))
    model = text_model(load_with(loader, name, "model", arguments))
    keep_unpacked(model)
    return model


def load_config(name: str, gguf_file: str | None = None) -> PreTrainedConfig:
    """The configuration of the model called `name`.

    Raises:
        ModelError: where nothing loadable is there.
    """
    return load_with(AutoConfig, name, "model config", {"gguf_file": gguf_file} if gguf_file else {})


def auto_class(config: PreTrainedConfig) -> Any:
    """What loads and builds models of this configuration: causal LMs, or what reads images where there are none."""
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    only_so = reads_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only_so else AutoModelForCausalLM


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM inside a model that reads images besides (Gemma 3 from 4B on, Ministral 3); any other model itself.

    Its modules are those of `model`, which should not be used any more; what they are quantised to stays.

    Raises:
        UnsupportedModelError: where transformers has no causal LM of just that text part, or adapters are on it.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__}: take the text part of the model that LoRA is then put on")
    config = model.config.get_text_config()
    if config is model.config:
        return model
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    with torch.device("meta"):
        text = None if causal is None else causal(config)
    decoder = next((m for m in model.modules() if text is not None and type(m) is type(text.base_model)), None)
    if text is None or decoder is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its text part, {config.model_type!r}, is no causal language model by itself"
        )
    setattr(text, text.base_model_prefix, decoder)
    head = model.get_output_embeddings()
    text.set_output_embeddings(head)
    text.config, text.generation_config = decoder.config, model.generation_config
    text.config.dtype, text.config.architectures = model.config.dtype, [type(text).__name__]
    text.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    text.name_or_path = text.config._name_or_path = model.name_or_path
    if getattr(model, "is_quantized", False):
        text.config.quantization_config = model.config.quantization_config
        vars(text).update({name: value for name, value in vars(model).items() if name in _OF_QUANTISED})
    return text.train(model.training)


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


def quantised(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """A model of the same weights, its linear layers quantised as `load_model` does it.

    Args:
        bits: 4 or 8.

    Raises:
        ConfigError: where bitsandbytes is not installed.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    made = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=dtype,
        quantization_config=_quantised(bits, dtype),
    )
    keep_unpacked(made)
    return made


def keep_unpacked(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights as they are stored.

    On a CPU with bfloat16 arithmetic it repacks them at the first forward in evaluation mode, and what dequantises them
    afterwards, PEFT's merging too, gives other numbers.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer called `name`; one without a padding token pads with its end-of-text token.

    Raises:
        ModelError: where nothing loadable is there.
    """
    name, gguf_file = split_gguf(name, gguf_file)
    tokenizer = load_with(AutoTokenizer, name, "tokenizer", {"gguf_file": gguf_file} if gguf_file else {})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def split_gguf(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Folder and file of a name that ends in `.gguf`."""
    if gguf_file is None and name.endswith(".gguf"):
        return str(Path(name).parent), Path(name).name
    return name, gguf_file


def load_with(loader: Any, name: str, what: str, arguments: dict[str, Any]) -> Any:
    """`loader.from_pretrained(name, **arguments)`, where what is missing or broken is one line.

    Args:
        what: what is loaded, in words.

    Raises:
        ModelError: where nothing loadable is there.
    """
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
        for run in (path, path.parent):
            if (run / "final" / "adapter_config.json").is_file() and not (path / "config.json").exists():
                raise ModelError(f"{name} is of a run, and no model: give {run / 'pruned'}, its pruned one") from None
        raise ModelError(
            f"{name}: the {what} cannot be loaded, check the name and the network: {in_one_line(error)}"
        ) from None
