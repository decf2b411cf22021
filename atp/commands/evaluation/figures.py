"""The figures of a measured model by the names that gates use, and what changed between two models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atp.evaluation import Difference, TaskScore, compare_scores
from atp.evaluation.metrics import token_perplexity
from atp.evaluation.statistics import compare, unpaired

COSTS = ("parameters", "flops", "bytes", "memory", "prefill.ms", "decode.ms")
SPEEDS = ("prefill.ms", "decode.ms")
PERPLEXITY = "ppl"
_NOT_SHARES = ("ppl", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bleu", "chrf", "ter")


@dataclass(frozen=True)
class Measured:
    """What is written of a model, with its scores, and the rows that its perplexity came from.

    `rows`: each window's sum of -log p and number of label tokens; `windows`: their hash.
    """

    name: str
    result: dict[str, Any]
    scores: dict[str, TaskScore]
    rows: Tensor | None = None
    windows: str | None = None


def is_share(name: str) -> bool:
    """Whether a figure is a share of 1 that people read in percent: all scores but those known to be none."""
    return name not in COSTS and name.rsplit(".", 1)[-1].partition(",")[0] not in _NOT_SHARES


def figures(measured: Measured) -> dict[str, float]:
    """By name, all that was measured."""
    result: Mapping[str, Any] = measured.result
    found = {
        "parameters": result["parameters"],
        "flops": result["flops_per_token"],
        "bytes": result.get("bytes"),
        "memory": result.get("peak_memory_mib"),
        "prefill.ms": result.get("prefill", {}).get("latency_ms"),
        "decode.ms": result.get("decode", {}).get("latency_ms_per_token"),
        PERPLEXITY: result.get("perplexity"),
    }
    scores = {
        f"{task}.{metric}": estimate.value
        for task, score in measured.scores.items()
        for metric, estimate in score.metrics.items()
    }
    return {name: float(value) for name, value in (found | scores).items() if value is not None}


def differences(baseline: Measured, other: Measured) -> dict[str, Difference]:
    """By name, what changed from `baseline`; paired row by row where both were measured on the same rows.

    Perplexities are paired where both models read the very same windows of tokens.
    """
    before, after = figures(baseline), figures(other)
    found = {name: unpaired(before[name], after[name]) for name in before if name in after}
    if baseline.rows is not None and other.rows is not None and baseline.windows == other.windows:
        found[PERPLEXITY] = compare(_items(baseline.rows), _items(other.rows), token_perplexity)
    for task, score in other.scores.items():
        paired = compare_scores(task, baseline.scores[task], score)
        found |= {f"{task}.{metric}": difference for metric, difference in paired.items()}
    return found


def _items(rows: Tensor) -> dict[str, Any]:
    sums, counts = rows[rows[:, 1] > 0].T.to(torch.float64).numpy()
    return {"nll": sums, "tokens": counts}
