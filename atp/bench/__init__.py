"""Timings of training steps, exports and exported models, beside dense ones, on random weights of any shapes."""

from atp.bench.export import export_cases
from atp.bench.infer import infer_cases, pruned_copy
from atp.bench.kernels import kernel_cases
from atp.bench.plan import ENGINES, Plan, plan, seconds_here
from atp.bench.timing import Case, Result, ceilings, interleaved
from atp.bench.train_step import train_step_cases
from atp.bench.whole_run import whole_run_results

__all__ = [
    "ENGINES",
    "Case",
    "Plan",
    "Result",
    "ceilings",
    "export_cases",
    "infer_cases",
    "interleaved",
    "kernel_cases",
    "plan",
    "pruned_copy",
    "seconds_here",
    "train_step_cases",
    "whole_run_results",
]
