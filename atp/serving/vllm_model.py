"""What vLLM serves for a ragged or `disp` folder: its Transformers backend, blocks resized as `modeling_atp` does.

Imported by vLLM alone, when a folder names a pruned architecture. Needs no `trust_remote_code`. Not tried: tensor and
pipeline parallelism (the first needs head counts and widths that it divides, in every block).
"""

from typing import Any

import torch
from transformers import AutoModel
from vllm.model_executor.models.transformers import TransformersForCausalLM

from atp.serving.blocks import headless_class

INDICES = ("residual_in", "residual_out")


class PrunedForCausalLM(TransformersForCausalLM):
    """vLLM's wrapper around a headless transformers model; its base class builds that by `AutoModel.from_config`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        config_class: Any = type(config)
        AutoModel.register(config_class, headless_class(config_class), exist_ok=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pp_group.is_last_rank:
            self.logits_processor.scale /= getattr(config, "logits_scaling", 1.0)  # Granite's
        device = vllm_config.device_config.device
        for module in self.modules():
            for name in INDICES:
                if name in module._buffers:  # made on the meta device, as parameters are
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
