"""Loading an exported folder, with one clear line when it is damaged."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp.errors import CheckpointError, in_one_line
from atp.weights import weight_files


def load(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model in folder `path`, through `AutoModelForCausalLM.from_pretrained(path, **kwargs)`.

    Raises:
        CheckpointError: where the folder or its config is missing or unreadable, weights are truncated, or any
            tensor is absent or has another shape.
    """
    path = Path(path)
    _check_config(path)
    weight_files(path)  # an index must not lead elsewhere
    arguments = {"output_loading_info": True, "use_safetensors": True} | kwargs
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, **arguments)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: weights cannot be read ({in_one_line(error)}): export the model again"
        ) from error
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({in_one_line(error)}): export the model again") from error
    for what in ("missing_keys", "mismatched_keys"):
        if found[what]:
            names = sorted(str(name) for name in found[what])
            raise CheckpointError(
                f"{path}: {len(names)} {what.replace('_', ' ')}, first {names[0]}: export the model again"
            )
    return model


def _check_config(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: pass one that atp.export wrote")
    config = path / "config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{config} cannot be read ({in_one_line(error)}): export the model again") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise CheckpointError(f"{config} names no model_type: export the model again")
