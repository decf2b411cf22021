"""Reading nested values that others wrote: what is absent or of another type is `None`, never an exception."""

import math
import re
from collections.abc import Mapping
from typing import Any

_LOWER = frozenset(
    {"perplexity", "ppl", "nll", "loss", "bits", "error", "errors", "brier", "mse", "rmse", "mae", "wer", "cer", "ter"}
)
"""Words in the names of metrics."""


def at(values: Any, *path: str) -> Any:
    """The value under nested keys, or `None`."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def mapping_at(values: Any, *path: str) -> Mapping[str, Any]:
    """As `at`; empty where there is no mapping."""
    found = at(values, *path)
    return found if isinstance(found, Mapping) else {}


def number_at(values: Any, *path: str) -> float | None:
    """As `at`, for a number, which may be infinite or NaN."""
    return number(at(values, *path))


def text_at(values: Any, *path: str) -> str | None:
    """As `at`, for a text."""
    found = at(values, *path)
    return found if isinstance(found, str) else None


def flag(value: Any) -> bool | None:
    """Yes or no, or `None` for what is neither."""
    return value if isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A number, or `None` for what is none. Yes and no are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(value: Any) -> float | None:
    """A number that can be drawn."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, of dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ, both flat, as `atp.sparsity: 0.4 there, 0.5 now`."""
    return [
        f"{key}: {there.get(key, 'nothing')} there, {now.get(key, 'nothing')} now"
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key)
    ]


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric of that name is the better one; after a comma stands a filter's name."""
    return not _LOWER.isdisjoint(re.split(r"[^a-z]+", metric.partition(",")[0].lower()))
