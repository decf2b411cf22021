"""What became worse than the baseline, and whether the two were measured on the same data at all.

A score is worse where the paired 95 % bootstrap interval of the items' differences lies on the worse side of zero;
without items, where the two scores' intervals do not overlap. A perplexity is worse from 3 % on.
"""

import math
from collections.abc import Sequence

import numpy as np

from atp.report.page.tasks import Score
from atp.report.page.texts import short
from atp.report.page.variants import Variant
from atp.report.record import Record
from atp.report.values import at, finite, lower_is_better, mapping_at
from atp.resampling import interval, resampled

PERPLEXITY_TOLERANCE = 0.03
_DRAWS = 2_000
"""Fewer than an evaluation's, for every run of a page on every task is compared."""

_FILES = ("train", "validation", "train_split", "validation_split", "tasks")


def regressions(variants: Sequence[Variant], baseline: Variant) -> list[str]:
    """A sentence for each figure that is worse than the baseline's by more than chance, or than the tolerance."""
    found = []
    for variant in variants:
        if variant is not baseline:
            found += [
                f"{variant.name}: {what}"
                for what in (_perplexity(variant, baseline), *_tasks(variant, baseline))
                if what
            ]
    return found


def _perplexity(variant: Variant, baseline: Variant) -> str | None:
    now, before = variant.perplexity, baseline.perplexity
    if now is None or before is None or not math.isfinite(before):
        return None
    if math.isfinite(now) and now <= before * (1 + PERPLEXITY_TOLERANCE):
        return None
    change = f"{(now / before - 1) * 100:+.1f} %" if math.isfinite(now) else "not finite"
    return f"perplexity {short(now)} against {short(before)} ({change})"


def _tasks(variant: Variant, baseline: Variant) -> list[str]:
    found = []
    for task, now in variant.scores.items():
        before = baseline.scores.get(task)
        if before and before.metric == now.metric and (how := _worse(task, now, before, variant, baseline)):
            found.append(f"{task}, {now.metric} {now.text} against {before.text} ({how})")
    return found


def _worse(task: str, now: Score, before: Score, variant: Variant, baseline: Variant) -> str | None:
    """How it is known that a score is worse; `None` where it is not."""
    if before.value is None or now.value is None:
        return None
    sign = -1.0 if lower_is_better(now.metric) else 1.0
    if not math.isfinite(now.value):
        return "not finite" if math.isfinite(before.value) else None
    items = [_items(each, task, now.metric) for each in (variant, baseline)]
    if items[0] and items[1] and len(items[0]) == len(items[1]) and not _differ(variant, baseline, f"tasks/{task}"):
        change = sign * (np.array(items[0]) - np.array(items[1]))
        _, high = interval(resampled(lambda index: change[index].mean(axis=1), len(change), _DRAWS))
        return f"paired over {len(items[0]):,} items" if high < 0 else None
    if None in (now.low, now.high, before.low, before.high):
        return None
    worst, best = (now.high, before.low) if sign > 0 else (before.high, now.low)
    return "95 % intervals apart" if worst is not None and best is not None and worst < best else None


def _items(variant: Variant, task: str, metric: str) -> list[float] | None:
    """Per row, of a single run; with several seeds there is no one item."""
    given = at(variant.first.metrics, "tasks", task, "items", metric) if len(variant.records) == 1 else None
    values = [finite(value) for value in given] if isinstance(given, list) else []
    return [value for value in values if value is not None] if values and None not in values else None


def _differ(one: Variant, other: Variant, name: str) -> bool:
    prints = [fingerprints(each.first).get(name) for each in (one, other)]
    return None not in prints and prints[0] != prints[1]


def fingerprints(record: Record) -> dict[str, str]:
    """What was measured on, and trained on: of each split and task, as far as the run tells."""
    found = {k: str(v) for k, v in mapping_at(record.metrics, "data", "fingerprints").items() if v}
    for task, score in mapping_at(record.metrics, "tasks").items():
        if fingerprint := at(score, "fingerprint"):
            found.setdefault(f"tasks/{task}", str(fingerprint))
    return found


def same_data(records: Sequence[Record]) -> bool | None:
    """Whether all were measured on the same data; `None` where it is not recorded of some."""
    names = _measured_on(records)
    prints = [fingerprints(record) for record in records]
    if any(len({each[name] for each in prints if name in each}) > 1 for name in names):
        return False
    return None if _unknown(records) else True


def data_warnings(records: Sequence[Record]) -> list[str]:
    """Whether all runs saw the same data, where that is in doubt. A task that one run lacks is no doubt."""
    prints = [fingerprints(record) for record in records]
    warnings = []
    for name in ["train", *_measured_on(records)]:
        by_print: dict[str, list[str]] = {}
        for record, each in zip(records, prints, strict=True):
            if name in each:
                by_print.setdefault(each[name], []).append(record.name)
        if len(by_print) > 1:
            verb = "trained" if name == "train" else "measured"
            who = _few(" | ".join(", ".join(names) for names in by_print.values()))
            warnings.append(f"These runs were {verb} on different data: {name} is not the same ({who}).")
    if unknown := _unknown(records):
        files = {repr([mapping_at(record.recipe, "data").get(key) or None for key in _FILES]) for record in records}
        named = all(mapping_at(record.recipe, "data") for record in records) and len(files) == 1
        whom = "these runs" if len(unknown) == len(records) else f"{_few(', '.join(unknown))}"
        warnings.append(
            f"Whether the data were the same is unknown: {whom} recorded no fingerprints of what they were measured on"
            + (", but all recipes name the same files." if named else ".")
        )
    return warnings


def _measured_on(records: Sequence[Record]) -> list[str]:
    """Names of the data sets that scores and perplexities were measured on, as fingerprints name them."""
    names = dict.fromkeys(name for record in records for name in fingerprints(record))
    return [name for name in names if name not in ("train", "calibration")]


def _unknown(records: Sequence[Record]) -> list[str]:
    """Names of the runs that measured something on data that they left no fingerprint of."""
    return [record.name for record in records if any(name not in fingerprints(record) for name in _needed(record))]


def _needed(record: Record) -> list[str]:
    needed = [f"tasks/{task}" for task in mapping_at(record.metrics, "tasks")]
    return needed if record.perplexity is None else ["validation", *needed]


def _few(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:160]} ..."
