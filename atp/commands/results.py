"""What `atp train` says of a run in `metrics.json`: data, the base model, what came out of it, and what both write."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.commands.datasets import RunData
from atp.commands.models import bytes_of, to_best_device
from atp.commands.versions import versions_of
from atp.data import Row
from atp.evaluation import continuation, folder_bytes, model_cost, perplexity, score_task
from atp.loading import load
from atp.models import load_model
from atp.recipe import Recipe
from atp.structure.sharding import is_sharded

logger = logging.getLogger(__name__)

_VERSIONS = ("torch", "transformers", "peft", "accelerate", "datasets", "atp")


def base_results(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData
) -> dict[str, Any]:
    """Cost, quality and samples of the model as it was before tuning; it is moved to the best device."""
    model = to_best_device(model)
    stored = bytes_of(recipe.model.name_or_path, recipe.model.gguf_file)
    return {
        **model_cost(model),
        **({} if stored is None else {"bytes": stored}),
        **quality(model, tokenizer, data),
        "samples": _written(model, tokenizer, data.samples),
    }


def run_results(
    recipe: Recipe, tuned: PeftModel, tokenizer: PreTrainedTokenizerBase, data: RunData, base: dict[str, Any] | None
) -> dict[str, Any]:
    """Of the model that a run has ended with, loaded as a stranger would.

    Args:
        tuned: what was trained, masks and adapter on it.
        base: `base_results`, where the base model was measured.
    """
    model = _pruned(recipe, tuned) if recipe.atp else _dense(recipe, tuned)
    nothing = [None] * len(data.samples)
    before = base.pop("samples") if base else nothing
    found: dict[str, Any] = {}
    texts: Sequence[str | None] = nothing
    try:
        model = to_best_device(model)
        found |= _cost(recipe, model)
        for part in _qualities(model, tokenizer, data):
            found |= part
        texts = _written(model, tokenizer, data.samples)
    except torch.OutOfMemoryError:
        logger.warning(
            "atp: %s is complete, but there was no room on the GPU to measure all of the model beside what was "
            "trained: atp eval does it",
            recipe.output_dir,
        )
    samples = [
        {"prompt": row.prompt, "reference": row.completion, "base": old, "result": new}
        for row, old, new in zip(data.samples, before, texts, strict=True)
    ]
    return {
        "data": _data(recipe, data),
        **({"base": base} if base else {}),
        **found,
        "samples": samples,
        "versions": versions_of(*_VERSIONS),
    }


def quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> dict[str, Any]:
    """Perplexity on held-out text and scores on tasks, as far as the recipe names them."""
    return {name: found for part in _qualities(model, tokenizer, data) for name, found in part.items()}


def _qualities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> Iterator[dict[str, Any]]:
    """Part by part: what has been measured outlives a GPU without room for the next."""
    if data.validation is not None:
        yield {"validation": dataclasses.asdict(perplexity(model, data.validation))}
    if data.tasks:
        scores = {name: score_task(name, rows, model, tokenizer) for name, rows in data.tasks.items()}
        yield {"tasks": {name: dataclasses.asdict(score) for name, score in scores.items()}}


def _pruned(recipe: Recipe, masked: PeftModel) -> PreTrainedModel:
    """The exported folder as a stranger loads it; without one, the masked model."""
    folder = _export_of(recipe)
    if folder.is_dir():
        return load_model(str(folder))
    return load(recipe.output_dir) if _is_in_parts(masked) else masked


def _dense(recipe: Recipe, tuned: PeftModel) -> PreTrainedModel:
    """The adapter is merged, but into quantised weights, where merging loses."""
    if _is_in_parts(tuned):
        tuned = PeftModel.from_pretrained(base_model(recipe), str(Path(recipe.output_dir) / "final"))
    return tuned.get_base_model() if recipe.model.bits else tuned.merge_and_unload()


def _is_in_parts(model: PeftModel) -> bool:
    """Whether it cannot run any more: the other processes have gone."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def _cost(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Of the exported or the dense model; a masked one costs what it cost."""
    if not recipe.atp:
        return {"tuned": model_cost(model)}
    folder = _export_of(recipe)
    return {"pruned": model_cost(model) | {"bytes": folder_bytes(folder)}} if folder.is_dir() else {}


def _export_of(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / "pruned"


def base_model(recipe: Recipe) -> PreTrainedModel:
    """The model that a recipe names, on the CPU."""
    base = recipe.model
    return load_model(base.name_or_path, base.gguf_file, base.dtype, base.bits)


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[str]:
    return [continuation(model, tokenizer, row.prompt) for row in rows]


def _data(recipe: Recipe, data: RunData) -> dict[str, Any]:
    settings = recipe.data
    named = {"train": settings.train, "validation": settings.validation, "calibration": settings.calibration}
    return {name: value for name, value in named.items() if value} | {
        "fingerprints": data.fingerprints,
        "rows": data.rows,
    }
