"""Scores on the harness's own tasks, by name, with the prompts, examples and metrics that it defines.

A metric that is the mean of its rows' values has the bootstrap interval of local tasks, and is paired; of any other
(corpus BLEU, a group's mean) the harness's own standard error gives the interval, 1.96 of them to either side.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.errors import ConfigError, DataError
from atp.evaluation.metrics import mean_of
from atp.evaluation.statistics import Estimate, estimate
from atp.evaluation.tasks.harness import evaluate, harnessed, part, protocol, quietly, truncated
from atp.evaluation.tasks.local import interval
from atp.evaluation.tasks.score import TaskScore
from atp.subset import evenly_spread

_SEED = 1234  # of the examples before a prompt, as `lm_eval` has it


@dataclass(frozen=True)
class NamedTask:
    """One of the harness's tasks, loaded with its data; a group's are several. `metrics` are those it gives."""

    name: str
    task: Any
    metrics: tuple[str, ...]


def load_named(names: Sequence[str], include_path: str | None = None) -> list[NamedTask]:
    """Load tasks, groups and tags of the harness.

    Args:
        include_path: a folder of task definitions (YAML), looked at before the harness's own.

    Raises:
        ConfigError: where a name is unknown, or lm-eval not installed.
        DataError: where the data of a task cannot be had.
    """
    manager_class = part("lm_eval.tasks").TaskManager
    with quietly():
        manager = manager_class(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or any(name not in manager.all_tasks for name in names):
            manager = manager_class(include_path=include_path)
        for name in names:
            if name not in manager.all_tasks:
                raise ConfigError(
                    f"task {name!r} is neither a .jsonl file, a folder of them, nor a task of lm-eval: check the name "
                    "(`lm-eval ls tasks` lists them) or give --include-path with its YAML"
                )
        try:
            tasks = manager.load(list(names))["tasks"]
        except Exception as error:  # whatever the data set's loader or its network raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{', '.join(names)}: lm-eval cannot load the data: {reason}") from None
    return [NamedTask(name, _prepared(task), _metrics(task)) for name, task in tasks.items()]


def score_named(
    tasks: Sequence[NamedTask],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    rows: int | None = None,
) -> dict[str, TaskScore]:
    """Score `model` on the harness's tasks, by name.

    Args:
        rows: only as many of each, evenly spread.
    """
    chosen = {each.name: evenly_spread(len(each.task.eval_docs), rows) for each in tasks} if rows else None
    with harnessed(model, tokenizer, batch_size) as lm:
        found = evaluate(lm, {each.name: each.task for each in tasks}, chosen)
        return {each.name: _score(each.name, found, lm) for each in tasks}


def _prepared(task: Any) -> Any:
    """As `lm_eval` itself prepares one: no examples unless the task says so, and always the same ones."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    return task


def _metrics(task: Any) -> tuple[str, ...]:
    filters = [each.name for each in getattr(task, "_filters", [])] or ["none"]
    return tuple(_name(metric, kind) for kind in filters for metric in task.aggregation())


def _name(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _score(name: str, found: Mapping[str, Any], lm: Any) -> TaskScore:
    samples = found["samples"][name]
    metrics: dict[str, Estimate] = {}
    items: dict[str, list[float]] = {}
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        known = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
        metrics[_name(metric, filtered)], kept = _estimate(
            value, found["results"][name].get(f"{metric}_stderr,{filtered}"), known
        )
        if kept:
            items[_name(metric, filtered)] = kept
    first, rows = next(iter(metrics)), [s for s in samples if s["filter"] == samples[0]["filter"]]
    return TaskScore(
        first,
        metrics[first].value,
        metrics[first].stderr,
        len(rows),
        metrics,
        truncated(lm, rows),
        protocol=protocol(lm) | _protocol(found["configs"][name], found["versions"][name]),
        fingerprint=hashlib.sha256("".join(row["doc_hash"] + row["prompt_hash"] for row in rows).encode()).hexdigest(),
        items=items or None,
    )


def _estimate(value: float, stderr: Any, known: Sequence[Any]) -> tuple[Estimate, list[float] | None]:
    """With the rows' values, where the metric is their mean."""
    if known and all(isinstance(each, int | float | np.number | np.bool_) for each in known):
        values = np.asarray(known, dtype=np.float64)
        if np.isclose(values.mean(), value):
            return estimate({"value": values}, mean_of("value"), "value"), values.tolist()
    if not isinstance(stderr, int | float):
        return Estimate(float(value), None, None, None), None
    return Estimate(float(value), float(stderr), value - 1.96 * stderr, value + 1.96 * stderr), None


def _protocol(config: Mapping[str, Any], version: Any) -> dict[str, Any]:
    told = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "generation_kwargs")
    return {
        "prompt": "the harness's",
        "shots": config.get("num_fewshot", 0),
        "task_version": version,
        "interval": interval(),
        **{name: str(config[name]) for name in told if config.get(name) is not None},
    }
