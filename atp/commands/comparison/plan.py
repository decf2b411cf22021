"""Which runs a comparison makes, and everything about them that can be checked before the first one starts."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.commands.datasets import load_data
from atp.commands.models import load_shell
from atp.config import ATPConfig
from atp.errors import ConfigError
from atp.models import load_tokenizer
from atp.recipe import Recipe
from atp.report.values import changes, flat
from atp.strategies import DENSE, strategy_config
from atp.structure.budget import target_parameters
from atp.structure.building import build_space
from atp.structure.discovery import discover


@dataclass(frozen=True)
class Run:
    """One training run of a comparison; `sparsity` is None for `dense`, `learning_rate` where it is the recipe's."""

    strategy: str
    sparsity: float | None
    seed: int
    recipe: Recipe
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Names the run's row, and is safe as a folder name."""
        return run_name(self.strategy, self.sparsity, self.seed, self.learning_rate)

    @property
    def title(self) -> str:
        """What people read."""
        removed = "" if self.sparsity is None else f", {self.sparsity * 100:.4g} % removed"
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:.6g}"
        return f"{self.strategy}{removed}{rate}, seed {self.seed}"


def run_name(strategy: str, sparsity: float | None, seed: int, learning_rate: float | None = None) -> str:
    """`atp-0.4-seed0`, or `atp-0.4-lr0.001-seed0`."""
    parts = [strategy, *([] if sparsity is None else [f"{sparsity:.6g}"])]
    parts += [*([] if learning_rate is None else [f"lr{learning_rate:.6g}"]), f"seed{seed}"]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def make_plan(
    recipe: Recipe,
    strategies: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    runs_dir: Path,
    learning_rates: Sequence[float] = (),
) -> list[Run]:
    """All runs, seed by seed, so that an early look already compares every strategy; `dense` once per seed and rate.

    Args:
        learning_rates: none: the recipe's.

    Raises:
        ConfigError: on an unknown strategy or a setting outside its range.
    """
    runs: dict[str, Run] = {}
    own = recipe.training_arguments().learning_rate if learning_rates else None
    rates = [None if rate == own else rate for rate in learning_rates] or [None]
    for seed, rate, sparsity, strategy in itertools.product(seeds, rates, sparsities, strategies):
        run = make_run(recipe, strategy, None if strategy == DENSE else sparsity, seed, runs_dir, rate)
        runs.setdefault(run.name, run)
    return list(runs.values())


def make_run(
    recipe: Recipe,
    strategy: str,
    sparsity: float | None,
    seed: int,
    runs_dir: Path,
    learning_rate: float | None = None,
) -> Run:
    """The base recipe with the strategy's `atp` section, and one seed for LoRA, data order and decision."""
    base = recipe.atp or ATPConfig()
    changes: dict[str, Any] = {"seed": seed, "export": True} | ({} if sparsity is None else {"sparsity": sparsity})
    config = strategy_config(strategy, dataclasses.replace(base, **changes))
    rate = {} if learning_rate is None else {"learning_rate": learning_rate}
    own = dataclasses.replace(
        recipe,
        atp=config,
        training=recipe.training | {"seed": seed} | rate,
        measure_base=False,  # `dense` and the others start from the same
        output_dir=str(runs_dir / run_name(strategy, sparsity, seed, learning_rate)),
    )
    return Run(strategy, sparsity, seed, own, learning_rate)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same run: all settings but the place of the output, and what is measured beside it."""
    return {key: value for key, value in recipe.to_dict().items() if key not in ("output_dir", "measure_base")}


def differences(row: Mapping[str, Any], run: Run) -> list[str]:
    """Settings in which a finished row's recipe differs from the run's, as `atp.sparsity: 0.4 there, 0.5 now`.

    The row's recipe is read like any other, so that a setting that is newer than the row counts with its default.
    Settings that a run does not look at make no difference, nor do tasks where the row was scored on none: what it
    trained is the same.
    """
    try:
        recipe = Recipe.from_dict(row["recipe"] | {"output_dir": run.recipe.output_dir})
    except ConfigError as error:
        return [str(error)]
    there, now = (_in_use(each if recipe.data.tasks else _untasked(each)) for each in (recipe, run.recipe))
    return changes(there, now)


def _untasked(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tasks={}, task_rows=None))


def _in_use(recipe: Recipe) -> dict[str, Any]:
    """What `identity` says, flat, of the settings that the run looks at."""
    settings = identity(recipe) | ({"atp": recipe.atp.settings_in_use()} if recipe.atp else {})
    return flat(settings)


def check_plan(recipe: Recipe, runs: Sequence[Run]) -> None:
    """Read the data, and see that every budget can be reached in the model; nothing large is loaded.

    Raises:
        ATPError: of the kind that the run itself would end with.
    """
    if recipe.data.validation is None:
        raise ConfigError("data: `validation` is missing: a comparison is measured on held-out text, add it")
    recipe.lora_config()
    recipe.training_arguments()
    load_data(recipe.data, load_tokenizer(recipe.model.name_or_path, recipe.model.gguf_file), progress=False)
    structure = discover(load_shell(recipe.model.name_or_path, recipe.model.gguf_file))
    configs = [run.recipe.atp for run in runs if run.recipe.atp]
    for space, uniform, round_to, sparsity in {(c.space, c.uniform, c.round_to, c.sparsity) for c in configs}:
        target_parameters(build_space(structure, space, uniform, round_to), sparsity)
