"""What a run's files tell a model card: the recipe's base, data and settings, and what `metrics.json` measured."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.config import ATPConfig
from atp.export.card import README, About, Result, chosen, model_card
from atp.files import write_text
from atp.recipe import DataSettings, ModelSettings, Recipe

_BESIDE = ("report_to", "disable_tqdm", "save_", "logging_", "eval_", "dataloader_", "hub_", "push_")
"""Settings of a Trainer that do not change what comes out."""


def about_run(adapter: Path, base: ModelSettings) -> About:
    """What is known of the run whose `final/` or checkpoint is `adapter`, on `base`.

    `atp train` or a Trainer with our callback left it. Results are of `final/`.
    """
    adapter = adapter.absolute()
    recipe_file = adapter.parent / "recipe.yaml"
    if not recipe_file.is_file():
        return About(base.name_or_path, base.gguf_file, settings=_of_state(adapter / "atp" / "state.json"))
    recipe = Recipe.from_yaml(recipe_file)
    metrics = _read(adapter.parent / "metrics.json") if adapter.name == "final" else {}
    return about_recipe(dataclasses.replace(recipe, model=base), metrics)


def about_recipe(recipe: Recipe, metrics: Mapping[str, Any]) -> About:
    """What a recipe says, and the results of its run."""
    data = recipe.data
    sections = {
        "data": {"max_length": data.max_length, "packing": data.packing, "completion_only": data.completion_only},
        "lora": recipe.lora,
        "atp": chosen(recipe.atp) if recipe.atp else {},
        "training": {name: value for name, value in recipe.training.items() if not name.startswith(_BESIDE)},
    }
    return About(
        recipe.model.name_or_path,
        recipe.model.gguf_file,
        _names(data.train),
        {name: kept for name, section in sections.items() if (kept := _without_places(section))},
        tuple(_results(metrics, data)),
    )


def rewrite_card(folder: Path, about: About) -> None:
    """Write the README.md of a finished export anew, whole or not at all."""
    write_text(folder / README, f"{model_card(folder, about)}\n")


def _results(metrics: Mapping[str, Any], data: DataSettings) -> list[Result]:
    found = []
    if held_out := metrics.get("validation"):
        name = ", ".join(Path(name).name for name in _names(data.validation))
        found.append(Result(name, "perplexity", held_out["perplexity"], f"held out, {held_out['tokens']:,} tokens"))
    for task, score in metrics.get("tasks", {}).items():
        found.append(Result(task, score["metric"], score["value"], f"{score['rows']} rows"))
    return found


def _names(files: str | list[str] | None) -> tuple[str, ...]:
    return () if files is None else (files,) if isinstance(files, str) else tuple(files)


def _without_places(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without paths, which say nothing elsewhere."""
    return {key: value for key, value in section.items() if not (isinstance(value, str) and "/" in value)}


def _of_state(file: Path) -> dict[str, Any]:
    config = _read(file).get("config")
    return {"atp": chosen(ATPConfig.from_dict(config))} if config else {}


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none that can be read, for a card can do without."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
