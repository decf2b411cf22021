"""The model that vLLM serves for a ragged or `disp` folder: its Transformers backend on blocks resized as `modeling_atp` says.

Imported by vLLM alone, when a folder names a pruned architecture. Tensor parallelism needs head counts that it divides in every
block, which vLLM itself says.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from vllm.model_executor.models.transformers import TransformersForCausalLM

from atp.export.modeling_atp import resize

INDICES = ("residual_in", "residual_out")


class PrunedForCausalLM(TransformersForCausalLM):
    """vLLM's wrapper around a headless transformers model; its base class builds that by `AutoModel.from_config`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config_class = type(vllm_config.model_config.hf_config)
        AutoModel.register(config_class, headless_class(config_class), exist_ok=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        device = vllm_config.device_config.device
        for module in self.modules():
            for name in INDICES:
                if name in module._buffers:  # made on the meta device, as parameters are
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the base class, which wants indices to be whole numbers of the model's device."""
        return super().load_weights(weights)


@cache
def headless_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """The family's model without its head, blocks resized."""
    stock: Any = MODEL_MAPPING[config_class.__base__]

    class Headless(stock):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            blocks = config.atp["blocks"]
            resize(self, blocks | {"container": blocks["container"].removeprefix(f"{self.base_model_prefix}.")})

    Headless.__name__, Headless.config_class = stock.__name__, config_class
    return Headless
