"""The headline table of one run: dense, dense-tuned and pruned side by side."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from atp.report.page.parts import Table, Tile, Value
from atp.report.page.tasks import Score, scores
from atp.report.page.texts import NOTHING, compared, megabytes, moved, short
from atp.report.record import Record
from atp.report.values import finite, lower_is_better, mapping_at, number_at

DENSE, TUNED, PRUNED = "dense (base)", "dense-tuned", "pruned"

_COSTS: tuple[tuple[str, tuple[str, ...], Callable[[float | None], str]], ...] = (
    ("parameters", ("parameters",), short),
    ("FLOPs per token", ("flops_per_token",), short),
    ("bytes on disk", ("bytes",), megabytes),
    ("prompt, ms", ("prefill", "latency_ms"), short),
    ("decode, ms per token", ("decode", "latency_ms_per_token"), short),
    ("peak memory, MiB", ("peak_memory_mib",), short),
)


_TOLD = ("parameters", "prompt, ms", "decode, ms per token", "perplexity, held out")
"""Rows that come first, in large."""


@dataclass(frozen=True)
class Model:
    """One column: a model and what was measured of it. `held_out`: nats per token while training, at `step`."""

    name: str
    cost: Mapping[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    held_out: float | None = None
    step: int | None = None


def models_of(record: Record) -> list[Model]:
    """The columns: the base, the tuned model where it is known, and what came out."""
    metrics, journal = record.metrics, record.journal
    dense, pruned = journal.measured("dense"), journal.measured("pruned")
    base = Model(
        DENSE,
        mapping_at(metrics, "base") or _known_of_base(record),
        number_at(metrics, "base", "validation", "perplexity"),
        scores(mapping_at(metrics, "base")),
        *((dense[0][1], 0) if dense and dense[0][0] == 0 else (None, None)),
    )
    tuned = Model(TUNED, held_out=dense[-1][1], step=dense[-1][0]) if dense and dense[-1][0] > 0 else None
    plain = bool(mapping_at(metrics, "tuned")) or record.strategy == "dense"
    result = Model(
        TUNED if plain else PRUNED,
        record.cost or ({} if record.parameters is None else {"parameters": record.parameters}),
        record.perplexity,
        scores(metrics),
        *((pruned[-1][1], pruned[-1][0]) if pruned else (None, None)),
    )
    columns = [base, *([tuned] if tuned and not plain else []), result]
    return [model for model in columns if model.cost or model.perplexity is not None or model.held_out is not None]


def headline(record: Record) -> Table | None:
    """A row a figure, each against the base; `None` where nothing was measured."""
    models = models_of(record)
    rows = [*_cost_rows(models), *_quality_rows(models, record)]
    known = [row for row in rows if any(value.text != NOTHING for value in row[1:])]
    if not known:
        return None
    return Table("Headline", ("", *(model.name for model in models)), tuple(known), _note(models))


def tiles(table: Table | None) -> tuple[Tile, ...]:
    """The rows of the headline that say most, as far as the last column is compared with the base."""
    rows = [row for row in table.rows if row[-1].change] if table else []
    by_title = {row[0].text: row for row in rows}
    chosen = [title for title in _TOLD if title in by_title]
    chosen += [row[0].text for row in rows if row[-1].detail.startswith("[")][:2]
    return tuple(
        Tile(title, Value(row[-1].change, verdict=row[-1].verdict), f"{row[1].text} \u2192 {row[-1].text}")
        for title in chosen
        if (row := by_title[title])
    )


def _known_of_base(record: Record) -> dict[str, Any]:
    parameters = finite(record.journal.run.get("parameters"))
    return {} if parameters is None else {"parameters": parameters}


def _cost_rows(models: list[Model]) -> list[tuple[Value, ...]]:
    rows = []
    for title, path, text in _COSTS:
        values = [number_at(model.cost, *path) for model in models]
        base = values[0] if models and models[0].name == DENSE else None
        cells = [
            Value("as dense")
            if model.name == TUNED and not model.cost and base is not None
            # LoRA merges into weights that are there
            else compared(text(value), value, None if model.name == DENSE else base, True)
            for model, value in zip(models, values, strict=True)
        ]
        rows.append((Value(title), *cells))
    return rows


def _quality_rows(models: list[Model], record: Record) -> list[tuple[Value, ...]]:
    rows = []
    base = models[0] if models and models[0].name == DENSE else Model("")
    rows.append(
        (
            Value("perplexity, held out"),
            *(
                compared(short(m.perplexity), m.perplexity, None if m is base else base.perplexity, True)
                for m in models
            ),
        )
    )
    rows.append((Value("perplexity while training *"), *(_while_training(m, base) for m in models)))
    tasks = dict.fromkeys(task for m in models for task in m.scores)
    for task in tasks:
        known = [m.scores.get(task) for m in models]
        metric = next(score.metric for score in known if score)
        start = base.scores.get(task)
        rows.append(
            (
                Value(f"{task}, {metric}"),
                *(
                    Value(NOTHING)
                    if score is None
                    else moved(
                        short(score.value, 3),
                        score.value,
                        None if m is base or not start else start.value,
                        lower_is_better(metric),
                        score.interval,
                    )
                    for m, score in zip(models, known, strict=True)
                ),
            )
        )
    memory = number_at(record.metrics, "training", "peak_memory_mib")
    seconds = number_at(record.metrics, "training", "train_runtime")
    for title, value in (("peak memory of training, MiB", memory), ("training, s", seconds)):
        rows.append((Value(title), *(Value(short(value) if m is models[-1] else NOTHING) for m in models)))
    return rows


def _while_training(model: Model, base: Model) -> Value:
    value = perplexity_of(model.held_out)
    if value is None:
        return Value(NOTHING)
    start = None if model is base else perplexity_of(base.held_out)
    return compared(short(value), value, start, True, f"step {model.step:,}")


def perplexity_of(nll: float | None) -> float | None:
    """`exp(nll)`, infinite where it is too large for a float."""
    if nll is None:
        return None
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _note(models: list[Model]) -> str:
    notes = []
    if any(model.scores for model in models):
        notes.append("Scores with 95 % intervals.")
    if any(model.held_out is not None for model in models):
        notes.append(
            "* On a few held-out rows, the same for all columns, while training went on: not to be compared with the "
            "perplexity above. Dense-tuned is the model with its masks off, last measured at that step."
        )
    return " ".join(notes)
