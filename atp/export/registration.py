"""Ragged folders load through `AutoModelForCausalLM` with no flag: one registered model type for all families.

`config.json` of a ragged folder says `"model_type": "atp"`. Reading it asks `modeling_atp` for that one family's
classes, so that importing `atp` imports no modelling file.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from atp.export import modeling_atp


class PrunedConfig(PreTrainedConfig):
    """Stands in for every family's pruned config until `architectures` says which one it is."""

    model_type = modeling_atp.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's own config, its model class registered."""
        model_class = getattr(modeling_atp, config_dict["architectures"][0])
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **kwargs)


def register() -> None:
    """Make transformers know the model type `atp`. Harmless when repeated."""
    AutoConfig.register(modeling_atp.MODEL_TYPE, PrunedConfig, exist_ok=True)
