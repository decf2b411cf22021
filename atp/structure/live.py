"""Reaching into a live model: past PEFT's wrapper to the causal LM, past a LoRA layer to its base layer."""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import UnsupportedModelError
from atp.structure.sharding import shape_of


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be a `PeftModel`."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is not a transformers model: pass a PreTrainedModel or a PeftModel around one"
        )
    return inner


def base_layer(module: nn.Module) -> nn.Linear:
    """The layer that holds the base weight: `module` itself, or what a PEFT layer wraps."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module  # type: ignore[return-value]


def active_adapters(module: nn.Module) -> list[str]:
    """Names of the LoRA adapters that add to a layer's base weight: none where they are merged into it or off."""
    if not isinstance(module, LoraLayer) or module.merged or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def is_adapters(name: str) -> bool:
    """Whether a parameter of that name is LoRA's, or PEFT's copy of one that is trained whole."""
    return any(part in name for part in ("lora_", ".modules_to_save.", ".token_adapter."))


def adapter_delta(module: Any) -> Tensor | float:
    """What a LoRA layer's active adapters add to its weight, `(out_features, in_features)`, float32; else 0."""
    return sum((module.get_delta_weight(name).detach().float() for name in active_adapters(module)), 0.0)


def effective_weight(module: nn.Module) -> Tensor:
    """What a layer multiplies by, active adapters included: `(out_features, in_features)`, float32."""
    return dequantised_weight(base_layer(module)).float() + adapter_delta(module)


def effective_bias(module: Any) -> Tensor | None:
    """What a layer adds, `lora_bias` of active adapters included: `(out_features,)`, float32, or None."""
    scaled = [(1.0, base_layer(module).bias)]
    scaled += [(module.scaling[name], module.lora_B[name].bias) for name in active_adapters(module)]
    parts = [scale * bias.detach().float() for scale, bias in scaled if bias is not None]
    return sum(parts[1:], parts[0]) if parts else None


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer's weight is stored packed or as integers."""
    if not isinstance(module, nn.Linear):
        return False
    shape = (module.out_features, module.in_features)
    return tuple(shape_of(module.weight)) != shape or not module.weight.is_floating_point()


def require_unpacked(layer: nn.Module, path: str) -> None:
    """Refuse a layer whose 4-bit weight bitsandbytes has repacked (`atp.models.keep_unpacked`).

    Raises:
        UnsupportedModelError: naming `path`.
    """
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise UnsupportedModelError(
            f"{path}: bitsandbytes repacked this 4-bit weight for CPU inference and cannot undo it exactly: load the "
            "model anew, and train or export before any forward in evaluation mode, or use a GPU"
        )


def dequantised_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as floating point, `(out_features, in_features)`; `layer` stays as it was."""
    stored = layer.weight
    weight = dequantize_module_weight(layer)
    layer.weight = stored  # on the CPU, PEFT leaves a copy here that has lost its 8-bit state
    return weight.detach()
