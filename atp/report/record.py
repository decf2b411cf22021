"""One run as its folder, or one row of results, tells it. Whatever is missing or damaged is said, and left out."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atp.errors import DataError
from atp.journal import JOURNAL
from atp.report.journal import Journal, read_journal
from atp.report.values import at, finite, flat, mapping_at, number_at, text_at
from atp.strategies import DENSE, FREEZE_AT

METRICS, RECIPE = "metrics.json", "recipe.yaml"
RECOVERY = Path("recovered", "recovery.json")
_SEEDS = ("training.seed", "atp.seed")
_MEANS_NOTHING = ("output_dir", *_SEEDS)
"""Settings by which two runs of the same experiment may differ."""


@dataclass(frozen=True)
class Record:
    """What is known of one run.

    `metrics`: as `atp train` writes them, or one row of a comparison or of `atp eval`. `notes`: sentences about what is
    missing or damaged. `when`: seconds since the epoch at which it last wrote. `comparison`: the file of rows that it
    is one of. `recovery`: what `atp recover` did to the model that came out. `source`: the path that a user named.
    """

    name: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str | None = None
    journal: Journal = field(default_factory=Journal)
    notes: tuple[str, ...] = ()
    when: float | None = None
    comparison: str | None = None
    recovery: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether it has written its results."""
        return bool(self.metrics)

    @property
    def cost(self) -> Mapping[str, Any]:
        """Size and speed of the model that came out."""
        return mapping_at(self.metrics, "pruned") or mapping_at(self.metrics, "tuned")

    @property
    def parameters(self) -> float | None:
        """Parameters of the model that came out; of an unfinished run, as last estimated."""
        logged = self.journal.series("atp/parameters")
        return number_at(self.cost, "parameters") or (logged[-1][1] if logged else None)

    @property
    def perplexity(self) -> float | None:
        """On held-out text, of the model that came out."""
        return number_at(self.metrics, "validation", "perplexity")

    @property
    def sparsity(self) -> float | None:
        """The share of prunable parameters that was asked to go, `None` where nothing is pruned."""
        asked = finite(at(self.metrics, "sparsity")) or finite(at(self.metrics, "pruning", "sparsity_asked"))
        return asked or finite(at(self.recipe, "atp", "sparsity")) or finite(self.journal.run.get("sparsity"))

    @property
    def strategy(self) -> str | None:
        """As `atp compare` names it; of another run, read off the recipe."""
        named = text_at(self.metrics, "strategy")
        if named or not self.recipe:
            return named
        settings = mapping_at(self.recipe, "atp")
        if not settings:
            return DENSE if at(self.recipe, "atp") is False else None
        if settings.get("decision") == "criterion":
            timing = {share: name for name, share in FREEZE_AT.items()}.get(finite(settings.get("freeze_at")) or 0.0)
            return f"{timing}:{settings.get('init')}" if timing else "criterion"
        return "logits" if settings.get("decision") == "logits" else "atp"

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe, flat, without seeds and the place of the output."""
        return {key: value for key, value in flat(self.recipe).items() if key not in _MEANS_NOTHING}

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The recipe's, of training and of decisions."""
        recipe = flat(self.recipe)
        return tuple(recipe.get(name) for name in _SEEDS)


def read_run(folder: Path) -> Record:
    """What `atp train` left in a folder, however it ended.

    Raises:
        DataError: where the folder holds nothing of a run.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder: give the output_dir of a run")
    if not any((folder / name).is_file() for name in (METRICS, JOURNAL, RECIPE)):
        raise DataError(
            f"{folder}: holds none of {METRICS}, {JOURNAL} and {RECIPE}: give the output_dir of a run of atp train"
        )
    notes: list[str] = []
    metrics, _ = _read(folder / METRICS, json.loads, "the run has not finished: no final measurements", notes)
    recipe, text = _read(folder / RECIPE, yaml.safe_load, "no configuration can be shown", notes)
    journal = _journal(folder / JOURNAL, notes)
    recovery = _recovery(folder / RECOVERY, notes)
    times = [path.stat().st_mtime for name in (METRICS, JOURNAL, RECIPE) if (path := folder / name).is_file()]
    name = folder.resolve().name or str(folder)
    return Record(name, metrics, recipe, text, journal, tuple(notes), times[0], recovery=recovery)


def _journal(path: Path, notes: list[str]) -> Journal:
    if not path.is_file():
        notes.append(f"{path.name} is missing: nothing is known of how training went")
        return Journal()
    try:
        journal = read_journal(path)
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return Journal()
    if journal.unreadable:
        notes.append(f"{path.name}: {journal.unreadable} line(s) could not be read and are left out")
    return journal


def _recovery(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """Few runs are recovered: nothing is said where there is none."""
    return _read(path, json.loads, "what recovery did cannot be shown", notes)[0] if path.is_file() else {}


def _read(
    path: Path, parse: Callable[[str], Any], without: str, notes: list[str]
) -> tuple[Mapping[str, Any], str | None]:
    """The mapping in a file and its text; empty, with a note, where there is none."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: {without}")
        return {}, None
    try:
        text = path.read_text(encoding="utf-8")
        values = parse(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}): {without}")
        return {}, None
    if not isinstance(values, Mapping):
        notes.append(f"{path.name} does not hold a mapping: {without}")
        return {}, None
    return values, text
