"""`atp.load`: an exported folder as a model to use, or a run as a model to go on with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.callback import ADAPTERS, restore
from atp.errors import CheckpointError, ConfigError, in_one_line
from atp.export.loading import load as load_exported
from atp.models import load_model, load_tokenizer
from atp.recipe import ModelSettings, Recipe
from atp.structure.discovery import discover
from atp.structure.sample import base_sample, is_another
from atp.training.state import BASE, FOLDER, VALUES

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load(
    path: str | Path, *, base: str | None = None, gguf_file: str | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """The model that atp wrote to `path`.

    An exported folder (`pruned/`) comes as `AutoModelForCausalLM.from_pretrained(path, **kwargs)` gives it: to use, to
    tune, or to prune further with `ATPCallback`. Of a run's output folder (or its `final/`) comes what the run ended
    with: a `PeftModel` on the base model, its adapter trainable and its decision in force, to be trained on under the
    same masks, evaluated and exported. The folder of an adapter export comes as its adapter on its pruned base.

    Args:
        base, gguf_file: the base model of a run, where the run does not say or it has moved.
        kwargs: of a run, `dtype` only; it and quantisation are the recipe's otherwise.

    Raises:
        CheckpointError: where a folder, its config, an adapter or weights are missing or damaged.
        ModelError: where the base model cannot be loaded.
        ConfigError: for arguments that do not fit what lies at `path`.
    """
    adapter = adapter_folder(Path(path))
    if adapter is not None:
        return _load_tuned(adapter, base_of(adapter, base, gguf_file), **kwargs)
    if base is not None or gguf_file is not None:
        raise ConfigError(f"base and gguf_file are for runs, and {path} is no run's folder: leave them out")
    return load_exported(path, **kwargs)


def load_dense(
    path: str | Path, *, base: str | None = None, gguf_file: str | None = None, plain: bool = False
) -> PreTrainedModel:
    """The dense tuned model of a run's output folder: its base as it was and its adapter, merged, nothing pruned.

    Quantised base weights stay as they are, and the adapter beside them.

    Args:
        base, gguf_file: as in `load`.
        plain: load the base model unquantised, whatever the recipe says.

    Raises:
        CheckpointError, ModelError: as `load`.
    """
    adapter = adapter_of_run(Path(path))
    settings = base_of(adapter, base, gguf_file)
    if plain:
        settings = dataclasses.replace(settings, load_in_4bit=False, load_in_8bit=False)
    model = _with_adapter(adapter, settings)
    quantised = getattr(model.get_base_model(), "is_quantized", False)
    return model.get_base_model() if quantised else model.merge_and_unload()


def adapter_folder(path: Path) -> Path | None:
    """Where the adapter of a run, or of an adapter export, lies; None where there is none."""
    return next((f for f in (path / "final", path / "adapter", path) if (f / _CONFIG).is_file()), None)


def adapter_of_run(path: Path) -> Path:
    """As `adapter_folder`, of a folder that must have one.

    Raises:
        CheckpointError: where it has none.
    """
    adapter = adapter_folder(path)
    if adapter is None:
        raise CheckpointError(f"{path}: no final/adapter_config.json: give the output folder of a finished run")
    return adapter


def base_of(adapter: Path, base: str | None = None, gguf_file: str | None = None) -> ModelSettings:
    """Base model as given, else by what lies beside the adapter (the run's recipe, a pruned base), else by itself.

    The recipe's dtype and quantisation hold also for one that is given.

    Raises:
        CheckpointError: where nothing says.
    """
    adapter = adapter.absolute()
    recipe = adapter.parent / "recipe.yaml"
    if recipe.is_file():
        model = Recipe.from_yaml(recipe).model
        if not (base or gguf_file):
            return model
        return dataclasses.replace(model, name_or_path=base or model.name_or_path, gguf_file=gguf_file)
    if base:
        return ModelSettings(base, gguf_file)
    if (adapter.parent / "base" / "config.json").is_file():
        return ModelSettings(str(adapter.parent / "base"))
    try:
        name = json.loads((adapter / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{adapter / _CONFIG} cannot be read ({in_one_line(error)}): train or export again"
        ) from None
    if not name:
        raise CheckpointError(f"{adapter}: does not say which model it tuned: give base (on the command line, --base)")
    return ModelSettings(name, gguf_file)


def tokenizer_of(adapter: Path, base: ModelSettings) -> PreTrainedTokenizerBase:
    """That of the run, which may have given it a chat template or tokens, where it lies beside the adapter."""
    if (adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(str(adapter))
    return load_tokenizer(base.name_or_path, base.gguf_file)


def _load_tuned(adapter: Path, base: ModelSettings, dtype: Any = None, **kwargs: Any) -> PeftModel:
    if kwargs:
        raise ConfigError(f"{next(iter(kwargs))} is not allowed for {adapter}: a run loads as its recipe says")
    model = _with_adapter(adapter, base, dtype)
    if (adapter / FOLDER).is_dir():
        restore(model, adapter)
    return model


def _values(adapter: Path) -> dict[str, Any]:
    """What a run has saved beside its tensors; nothing, where nothing was pruned or it cannot be read."""
    try:
        values = json.loads((adapter / FOLDER / VALUES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _with_adapter(adapter: Path, base: ModelSettings, dtype: Any = None) -> PeftModel:
    values = _values(adapter)
    names = values.get(ADAPTERS, ["default"])  # nothing of them: a checkpoint, or an earlier version
    if names != ["default"]:
        raise CheckpointError(
            f"{adapter}: the run ended with the adapters {', '.join(names)}, and only one called 'default' can be "
            "loaded: take what it has exported, or load them with PEFT"
        )
    if not (adapter / _WEIGHTS).is_file():  # PEFT would ask the hub for them
        raise CheckpointError(f"{adapter / _WEIGHTS} is missing: train or export again")
    lm = load_model(base.name_or_path, base.gguf_file, dtype or base.dtype, base.bits)
    try:
        model = PeftModel.from_pretrained(lm, str(adapter), is_trainable=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{adapter}: does not fit {base.name_or_path} or is damaged ({in_one_line(error)})"
        ) from error
    if (tuned := values.get(BASE)) and is_another(tuned, base_sample(model, discover(model))):
        raise CheckpointError(
            f"{adapter}: was tuned on a model of other weights than {base.name_or_path}: give base (on the command "
            "line, --base)"
        )
    return model
