"""vLLM's plugin: ragged and `disp` folders, through vLLM's own Transformers modelling backend.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins` that installing `atp`
declares. Nothing of vLLM's models is imported then: our class is named, and imported when a folder asks for it.

Not covered: vLLM's hand-written model classes. The backend too fuses projections and norms and pages keys and values.
"""

import logging

from transformers import PreTrainedConfig

from atp.export.modeling_atp import MODEL_TYPE, PREFIX
from atp.export.registration import register as register_config
from atp.serving.blocks import block_configs

MODEL_CLASS = "atp.serving.vllm_model:PrunedForCausalLM"
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
    "StableLmForCausalLM",
    "GPTNeoXForCausalLM",
)
"""Those whose log-probabilities were compared; vLLM refuses others by name. What a family does to its logits after the
head is the backend's to know, and it knows no other scaling than Cohere's: `vllm_model` adds Granite's."""
logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the pruned `ARCHITECTURES`. Harmless when repeated.

    Raises nothing: an error here would keep vLLM from serving any model. A vLLM that knows no sizes per block is
    warned about.
    """
    try:
        from vllm import ModelRegistry  # noqa: PLC0415  # called by vLLM only
        from vllm.config.model_arch import ModelArchitectureConfig  # noqa: PLC0415
        from vllm.transformers_utils import model_arch_config_convertor as convertors  # noqa: PLC0415

        has_sizes = "per_layer_overrides" in ModelArchitectureConfig.__dataclass_fields__
    except ImportError:
        has_sizes = False
    if not has_sizes:
        logger.warning("atp: this vLLM has no sizes per block: use 0.30 or newer to serve ragged and disp folders")
        return

    class Convertor(convertors.ModelArchConfigConvertorBase):
        """Tells vLLM how many heads each block has."""

        def get_per_layer_hf_configs(self) -> list[tuple[PreTrainedConfig, PreTrainedConfig]]:
            return [(block, block) for block in block_configs(self.hf_config)]

    register_config()
    convertors.MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = Convertor
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(f"{PREFIX}{architecture}", MODEL_CLASS)
