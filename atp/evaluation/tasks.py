"""Scores on tasks, by EleutherAI's lm-evaluation-harness (`pip install atp[tasks]`).

rows with `choices`   accuracy: the choice with the highest sum of log p over its tokens is the labelled one
rows without          ROUGE-L (F1, stemmed) of what greedy decoding writes, against the completion

The prompt is the row's as it stands: no examples before it and no chat template. One that is longer than the model's
context loses its start. Writing ends at the end-of-text token, at a line's end where no completion of the task has one
inside, and after as many tokens as the longest completion has.

Not covered: paired tests between models.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.data import TaskRow
from atp.errors import ConfigError


@dataclass(frozen=True)
class TaskScore:
    """`value` in [0, 1], more is better; `stderr` is its standard error over rows, `None` with a single one."""

    metric: str
    value: float
    stderr: float | None
    rows: int


def check_tasks_available() -> None:
    """Raise `ConfigError` where what scores tasks is not installed."""
    _harness()


def score_task(
    name: str,
    rows: Sequence[TaskRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
) -> TaskScore:
    """Score `model` on the rows of one task.

    Args:
        name: what the harness calls the task in its progress bars and messages.

    Raises:
        ConfigError: where lm-eval or rouge-score is not installed.
    """
    evaluate, make_task, make_lm, scorer = _harness()
    settings, metric = (_choosing(), "acc") if rows[0].choices else (_writing(rows, tokenizer, scorer), "rougeL")
    records = [{"prompt": r.prompt, "completion": r.completion, "choices": r.choices, "label": r.label} for r in rows]
    config = {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(records)),
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "target_delimiter": "",
        **settings,
    }
    was_training = model.training
    model.eval()
    try:
        with _only_errors("lm_eval"):
            lm = make_lm(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, truncation=True)
            found = evaluate(lm=lm, task_dict={name: make_task(config=config)}, log_samples=False)["results"][name]
    finally:
        model.train(was_training)
    stderr = found[f"{metric}_stderr,none"] if len(rows) > 1 else None
    return TaskScore(metric, float(found[f"{metric},none"]), stderr, len(rows))


def _choosing() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["label"],
        "metric_list": [{"metric": "acc"}],
    }


def _writing(rows: Sequence[TaskRow], tokenizer: PreTrainedTokenizerBase, scorer: Any) -> dict[str, Any]:
    completions = [row.completion.strip() for row in rows]
    longest = max(len(ids) for ids in tokenizer(completions, verbose=False)["input_ids"])
    lines = any("\n" in completion for completion in completions)

    def rouge(doc: dict[str, Any], written: list[str]) -> dict[str, float]:
        return {"rougeL": scorer.score(doc["completion"], written[0])["rougeL"].fmeasure}

    return {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: doc["completion"],
        "generation_kwargs": {"until": [] if lines else ["\n"], "max_gen_toks": longest, "do_sample": False},
        "process_results": rouge,
        "metric_list": [{"metric": "rougeL", "aggregation": "mean", "higher_is_better": True}],
    }


def _harness() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Any]:
    """`evaluate`, the classes of a task and of a model, and the ROUGE scorer; imported when asked for."""
    try:
        from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415
        from lm_eval.evaluator import evaluate  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"tasks need {error.name}, which is not installed: pip install 'atp[tasks]'") from None
    return evaluate, ConfigurableTask, HFLM, RougeScorer(["rougeL"], use_stemmer=True)


@contextmanager
def _only_errors(logger: str) -> Iterator[None]:
    own = logging.getLogger(logger)
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)
