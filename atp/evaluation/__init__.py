"""Measures any Hugging Face causal LM, as a stranger would: it knows nothing of masks or decisions."""

from atp.evaluation.perplexity import Perplexity, perplexity
from atp.evaluation.speed import (
    Speed,
    count_parameters,
    folder_bytes,
    generation_speed,
    prefill_speed,
)

__all__ = [
    "Perplexity",
    "Speed",
    "count_parameters",
    "folder_bytes",
    "generation_speed",
    "perplexity",
    "prefill_speed",
]
