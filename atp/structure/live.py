"""Reaching into a live model: past PEFT's wrapper to the causal LM, past a LoRA layer to its base layer."""

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import UnsupportedModelError


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be a `PeftModel`."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not a transformers model: pass a PreTrainedModel or a PeftModel around one"
        )
    return inner


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that holds the base weight: `module` itself, or what a PEFT layer wraps."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def dequantised_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as floating point, `(out_features, in_features)`; `layer` stays as it was."""
    stored = layer.weight
    weight = dequantize_module_weight(layer)
    layer.weight = stored  # on the CPU, PEFT leaves a copy here that has lost its 8-bit state
    return weight.detach()
