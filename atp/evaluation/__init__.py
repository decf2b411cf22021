"""Measures any Hugging Face causal LM, as a stranger would: it knows nothing of masks or decisions."""

from atp.evaluation.flops import flops_per_token
from atp.evaluation.memory import peak_memory_mib, reset_peak_memory
from atp.evaluation.perplexity import Perplexity, perplexity
from atp.evaluation.samples import continuation
from atp.evaluation.speed import (
    Speed,
    count_parameters,
    folder_bytes,
    generation_speed,
    prefill_speed,
)
from atp.evaluation.subset import evenly_spread
from atp.evaluation.tasks import TaskScore, check_tasks_available, score_task

__all__ = [
    "Perplexity",
    "Speed",
    "TaskScore",
    "check_tasks_available",
    "continuation",
    "count_parameters",
    "evenly_spread",
    "flops_per_token",
    "folder_bytes",
    "generation_speed",
    "peak_memory_mib",
    "perplexity",
    "prefill_speed",
    "reset_peak_memory",
    "score_task",
]
