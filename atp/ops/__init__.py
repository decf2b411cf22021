"""Arithmetic that knows no models: eager definitions, and faster functions with the same values."""

from atp.ops.lora import lora_linear

__all__ = ["lora_linear"]
