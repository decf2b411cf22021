"""Arithmetic that knows no models: eager definitions, and faster functions with the same values."""

from atp.ops.compaction import compact_weight
from atp.ops.lora import Weight, frozen_linear, lora_linear
from atp.ops.selection import Selection, gather_features, scatter_features

__all__ = [
    "Selection",
    "Weight",
    "compact_weight",
    "frozen_linear",
    "gather_features",
    "lora_linear",
    "scatter_features",
]
