"""Timings of training steps and of exported models against dense ones, on random weights of any model's shapes."""

from atp.bench.infer import infer_cases, pruned_copy
from atp.bench.timing import Case, Result, ceilings, interleaved
from atp.bench.train_step import train_step_cases

__all__ = ["Case", "Result", "ceilings", "infer_cases", "interleaved", "pruned_copy", "train_step_cases"]
