"""Arithmetic that knows no models: eager definitions, and faster functions with the same values."""

from atp.ops.lora import Weight, frozen_linear, lora_linear
from atp.ops.selection import gather_features, scatter_features

__all__ = ["Weight", "frozen_linear", "gather_features", "lora_linear", "scatter_features"]
