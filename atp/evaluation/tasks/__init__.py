"""Scores on tasks, by EleutherAI's lm-evaluation-harness (`pip install atp[tasks]`): local rows, and its own tasks."""

from atp.evaluation.tasks.harness import check_tasks_available
from atp.evaluation.tasks.local import score_task
from atp.evaluation.tasks.named import NamedTask, load_named, score_named
from atp.evaluation.tasks.score import TaskScore, compare_scores

__all__ = [
    "NamedTask",
    "TaskScore",
    "check_tasks_available",
    "compare_scores",
    "load_named",
    "score_named",
    "score_task",
]
