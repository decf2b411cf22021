"""What `atp train` says of a run in `metrics.json`: data, the base model, what came out of it, and what both write."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.commands.datasets import RunData
from atp.commands.models import bytes_of, to_best_device
from atp.commands.versions import versions_of
from atp.data import Row
from atp.evaluation import continuation, folder_bytes, model_cost, perplexity, score_task
from atp.models import load_model
from atp.recipe import Recipe
from atp.structure.sharding import is_sharded

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
    model, cost = (_pruned if recipe.atp else _merged)(recipe, tuned)
    texts = _written(model, tokenizer, data.samples)
    before = base.pop("samples") if base else [None] * len(texts)
    samples = [
        {"prompt": row.prompt, "reference": row.completion, "base": old, "result": new}
        for row, old, new in zip(data.samples, before, texts, strict=True)
    ]
    return {
        "data": _data(recipe, data),
        **({"base": base} if base else {}),
        **cost,
        **quality(model, tokenizer, data),
        "samples": samples,
        "versions": versions_of(*_VERSIONS),
    }


def quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> dict[str, Any]:
    """Perplexity on held-out text and scores on tasks, as far as the recipe names them."""
    found: dict[str, Any] = {}
    if data.validation is not None:
        found["validation"] = dataclasses.asdict(perplexity(model, data.validation))
    if data.tasks:
        scores = {name: score_task(name, rows, model, tokenizer) for name, rows in data.tasks.items()}
        found["tasks"] = {name: dataclasses.asdict(score) for name, score in scores.items()}
    return found


def _pruned(recipe: Recipe, masked: PeftModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The exported folder as a stranger loads it, and what it costs; without one, the masked model."""
    folder = Path(recipe.output_dir) / "pruned"
    if not folder.is_dir():
        return masked, {}
    model = to_best_device(load_model(str(folder)))
    return model, {"pruned": model_cost(model) | {"bytes": folder_bytes(folder)}}


def _merged(recipe: Recipe, tuned: PeftModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merge the adapter as an export would: the dense model, and what it costs."""
    if any(is_sharded(parameter) for parameter in tuned.parameters()):  # the other processes have gone
        tuned = PeftModel.from_pretrained(base_model(recipe), str(Path(recipe.output_dir) / "final"))
    model = tuned.merge_and_unload()
    return model, {"tuned": model_cost(model)}


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
