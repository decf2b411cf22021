"""Ragged folders load through `AutoModelForCausalLM` with no flag: one registered model type for all families.

`config.json` of a ragged folder says `"model_type": "atp"`. Reading it asks `modeling_atp` for that one family's
classes, so that importing `atp` imports no modelling file.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from atp.export import modeling_atp


class PrunedConfig(PreTrainedConfig):
    """Stands in for every family's pruned config until `architectures` says which one it is."""

    model_type = modeling_atp.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's own config, its model class registered."""
        model_class = _model_class(config_dict.get("architectures"))
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)
        return model_class.config_class.from_dict(config_dict, **kwargs)


def _model_class(architectures: Any) -> type[PreTrainedModel]:
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    found = getattr(modeling_atp, name, None) if name.startswith(modeling_atp.PREFIX) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"config.json: architectures={architectures!r} names no pruned model of transformers")
    return found


def register() -> None:
    """Make transformers know the model type `atp`. Harmless when repeated."""
    AutoConfig.register(modeling_atp.MODEL_TYPE, PrunedConfig, exist_ok=True)
