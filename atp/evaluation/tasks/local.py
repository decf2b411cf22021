"""Scores on rows of a local file, by the harness.

choice       the choice with the highest sum of log p over its tokens is the labelled one: accuracy and macro-F1
generation   ROUGE-1, ROUGE-2 and ROUGE-L (F1, stemmed) of what greedy decoding writes, against the completion
text         perplexity per token and bits per byte of `text`, the first token predicted from the start-of-text token

The prompt is the row's as it stands, as in training: no examples before it and no chat template. One that is longer
than the model's context loses its start; a text that is longer is read in windows, of which each goes on from one
token. Writing ends at the end-of-text token, at a line's end where no completion of the task has one inside, and after
as many tokens as the longest completion has. F1 of classes: by the text of the choice where all rows have the same
choices, else by its number.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.data import TaskRow, fingerprint
from atp.errors import DataError
from atp.evaluation.metrics import METRICS
from atp.evaluation.tasks.harness import evaluate, harnessed, part, protocol, truncated
from atp.evaluation.tasks.score import TaskScore, scored
from atp.resampling import PERCENTILES, RESAMPLES, SEED

_ROUGE = tuple(METRICS["generation"])

Samples = Sequence[Mapping[str, Any]]


def score_task(
    name: str,
    rows: Sequence[TaskRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
) -> TaskScore:
    """Score `model` on the rows of one task, which are of one kind.

    Args:
        name: what the harness calls the task in its progress bars and messages.

    Raises:
        ConfigError: where lm-eval or rouge-score is not installed.
        DataError: where a choice or completion is longer than the model's context.
    """
    kind = rows[0].kind
    # a text's start-of-text token is given by the harness; a tokenizer's own would be a second one, and predicted
    own = {"add_bos_token": False} if kind == "text" else {}
    with harnessed(model, tokenizer, batch_size, **own) as lm:
        settings = {"choice": _choosing, "generation": _writing, "text": _reading}[kind](name, rows, lm)
        task = part("lm_eval.api.task").ConfigurableTask(config=_config(name, rows) | settings)
        samples = evaluate(lm, {name: task})["samples"][name]
        items, about = _ITEMS[kind](rows, samples, lm)
        return scored(
            kind,
            items,
            truncated=truncated(lm, samples),
            fingerprint=fingerprint(rows),
            protocol=protocol(lm) | _protocol(rows) | about | settings.get("generation_kwargs", {}),
        )


def interval() -> dict[str, Any]:
    """How the intervals were made."""
    return {"method": "percentile bootstrap", "percentiles": PERCENTILES, "resamples": RESAMPLES, "seed": SEED}


def _config(name: str, rows: Sequence[TaskRow]) -> dict[str, Any]:
    records = [{"prompt": r.prompt, "completion": r.completion, "choices": r.choices, "label": r.label} for r in rows]
    return {
        "task": name,
        "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(records)),
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "target_delimiter": "",
    }


def _protocol(rows: Sequence[TaskRow]) -> dict[str, Any]:
    different = Counter((row.prompt, row.completion) for row in rows)
    return {"prompt": "the row's as it stands", "shots": 0, "duplicates": len(rows) - len(different)} | {
        "interval": interval()
    }


def _choosing(name: str, rows: Sequence[TaskRow], lm: Any) -> dict[str, Any]:
    _check_lengths(name, rows, lm, {choice for row in rows for choice in row.choices}, lm.max_length + 1)
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: doc["label"],
        "metric_list": [{"metric": "acc"}],
    }


def _writing(name: str, rows: Sequence[TaskRow], lm: Any) -> dict[str, Any]:
    completions = [row.completion.strip() for row in rows]
    longest = _check_lengths(name, rows, lm, set(completions), lm.max_length)
    scorer = part("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE), use_stemmer=True)

    def rouge(doc: dict[str, Any], written: list[str]) -> dict[str, float]:
        found = scorer.score(doc["completion"], written[0])
        return {name: found[name].fmeasure for name in _ROUGE}

    return {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: doc["completion"],
        "generation_kwargs": {
            "until": [] if any("\n" in completion for completion in completions) else ["\n"],
            "max_gen_toks": longest,
            "do_sample": False,
        },
        "process_results": rouge,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in _ROUGE],
    }


def _reading(name: str, rows: Sequence[TaskRow], lm: Any) -> dict[str, Any]:
    del name, rows, lm  # a text may have any length
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda doc: doc["completion"],
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def _check_lengths(name: str, rows: Sequence[TaskRow], lm: Any, texts: set[str], limit: int) -> int:
    """Tokens of the longest of `texts`, which leaves the prompt a token of the context."""
    longest = max(texts, key=lambda text: len(lm.tokenizer(text, verbose=False)["input_ids"]))
    tokens = len(lm.tokenizer(longest, verbose=False)["input_ids"])
    if tokens >= limit:
        row = next(i for i, r in enumerate(rows) if longest in (*r.choices, r.completion.strip()))
        raise DataError(
            f"{name}, row {row + 1}: {tokens} tokens ({longest[:30]!r}...) are to be scored or written, and the "
            f"model's context has {lm.max_length}: shorten the row or take it out"
        )
    return tokens


def _chosen(rows: Sequence[TaskRow], samples: Samples, lm: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
    del lm
    chosen = [int(np.argmax([logp for logp, _ in sample["filtered_resps"]])) for sample in samples]
    labels = [row.label or 0 for row in rows]
    classes = _classes(rows)
    if classes:
        number = {text: index for index, text in enumerate(classes)}
        chosen = [number[row.choices[index]] for row, index in zip(rows, chosen, strict=True)]
        labels = [number[row.choices[index]] for row, index in zip(rows, labels, strict=True)]
    items = {"acc": [float(s["acc"]) for s in samples], "label": [*map(float, labels)], "chosen": [*map(float, chosen)]}
    return items, {"classes": classes or "numbers of choices", "choice": "highest sum of log p over its tokens"}


def _classes(rows: Sequence[TaskRow]) -> list[str] | None:
    """The texts of the choices, where all rows have the same ones, in whatever order."""
    first = rows[0].choices
    same = len(set(first)) == len(first) and all(sorted(row.choices) == sorted(first) for row in rows)
    return list(first) if same else None


def _written(rows: Sequence[TaskRow], samples: Samples, lm: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
    del rows, lm
    items = {name: [float(sample[name]) for sample in samples] for name in _ROUGE}
    return items, {"decoding": "greedy", "rouge": "F1, stemmed"}


def _read(rows: Sequence[TaskRow], samples: Samples, lm: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
    texts = [row.completion for row in rows]
    items = {
        "nll": [-float(sample["filtered_resps"][0]) for sample in samples],
        "tokens": [float(len(lm.tok_encode(text))) for text in texts],
        "bytes": [float(len(text.encode())) for text in texts],
    }
    rule = {"truncation": "nothing is lost: a text that does not fit the context is read in windows"}
    return items, rule | {"start": lm.tok_decode([lm.prefix_token_id], skip_special_tokens=False)}


_ITEMS = {"choice": _chosen, "generation": _written, "text": _read}
