"""Measures any Hugging Face causal LM, as a stranger would: it knows nothing of masks or decisions."""

from atp.evaluation.cost import model_cost
from atp.evaluation.flops import flops_per_token
from atp.evaluation.memory import peak_memory_mib, release_memory, reset_peak_memory
from atp.evaluation.parts import parts
from atp.evaluation.perplexity import Perplexity, perplexity, perplexity_by_row
from atp.evaluation.samples import continuation
from atp.evaluation.speed import (
    Speed,
    count_parameters,
    folder_bytes,
    generation_speed,
    prefill_speed,
)
from atp.evaluation.statistics import Difference, Estimate
from atp.evaluation.tasks import (
    NamedTask,
    TaskScore,
    check_tasks_available,
    compare_scores,
    load_named,
    score_named,
    score_task,
)

__all__ = [
    "Difference",
    "Estimate",
    "NamedTask",
    "Perplexity",
    "Speed",
    "TaskScore",
    "check_tasks_available",
    "compare_scores",
    "continuation",
    "count_parameters",
    "flops_per_token",
    "folder_bytes",
    "generation_speed",
    "load_named",
    "model_cost",
    "parts",
    "peak_memory_mib",
    "perplexity",
    "perplexity_by_row",
    "prefill_speed",
    "release_memory",
    "reset_peak_memory",
    "score_named",
    "score_task",
]
