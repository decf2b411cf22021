"""EleutherAI's lm-evaluation-harness, imported when asked for, around a model that is already loaded.

A prompt that does not fit the context loses its start, a stated number of rows. The harness needs a token to pad with
and one that ends a text; a tokenizer without gets them on a copy, where padding is masked and nothing is written to
the end token.
"""

import copy
import functools
import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.errors import ConfigError
from atp.passes import modes_kept

_END = "<|endoftext|>"


def check_tasks_available() -> None:
    """Raise `ConfigError` where what scores tasks is not installed."""
    for module in ("lm_eval.evaluator", "lm_eval.models.huggingface", "rouge_score.rouge_scorer", "scipy.stats"):
        part(module)


def part(module: str) -> Any:
    """A module of an optional dependency."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"tasks need {error.name}, which is not installed: pip install 'atp[tasks]'") from None


@contextmanager
def harnessed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, **settings: Any
) -> Iterator[Any]:
    """The harness's `LM` of a loaded model, whose modules get their modes back; the harness speaks of errors only."""
    with modes_kept(model), quietly():
        yield _lm_class()(model, batch_size=batch_size, **_with_tokens(tokenizer, model), **settings)


def _with_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
    """A copy of the tokenizer, and the token that begins a text where none of its own can."""
    own, begins = copy.deepcopy(tokenizer), {}
    if own.eos_token_id is None:
        own.add_special_tokens({"eos_token": _END})
        if own.bos_token_id is None:
            begins = {"prefix_token_id": 0}
    if own.pad_token_id is None or own.pad_token_id >= model.get_input_embeddings().num_embeddings:
        own.pad_token = own.convert_ids_to_tokens(0)
    return {"tokenizer": own, **begins}


@functools.cache
def _lm_class() -> Any:
    """`HFLM`, but for a head that computes no logits before the first one that is scored: a third of the time of a
    small model on prompts with short choices. It finds the positions from the end, as it does for prompt tuning.
    """
    harness_lm: Any = part("lm_eval.models.huggingface").HFLM

    class LM(harness_lm):
        longest = 0

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self.longest = max((len(continuation) for *_, continuation in requests), default=0)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
            if attn_mask is not None or "logits_to_keep" not in signature(self.model.forward).parameters:
                return super()._model_call(inps, attn_mask, labels)
            with torch.no_grad():
                return self.model(inps, logits_to_keep=self.longest + _padding(inps)).logits

    return LM


def _padding(ids: Tensor) -> int:
    """An upper bound of the padding at the end of any row, which the harness fills with token 0."""
    after_last = (ids != 0) * torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return ids.shape[1] - int(after_last.max(1).values.min())


def evaluate(lm: Any, tasks: Mapping[str, Any], rows: Mapping[str, list[int]] | None = None) -> dict[str, Any]:
    """The harness's results with its samples, in the rows' order.

    Args:
        rows: by task, which rows; None means all.
    """
    return part("lm_eval.evaluator").evaluate(
        lm=lm, task_dict=dict(tasks), samples=rows, log_samples=True, bootstrap_iters=1000
    )


def truncated(lm: Any, samples: Sequence[Mapping[str, Any]]) -> int:
    """How many rows have a prompt that lost its start because it does not fit the context."""
    return sum(any(_loses(lm, *arguments) for arguments in sample["arguments"]) for sample in samples)


def _loses(lm: Any, prompt: str, rest: Any = None, *_: Any) -> bool:
    if isinstance(rest, str):  # a continuation, whose last token is not read
        return len(lm.tok_encode(prompt + rest)) > lm.max_length + 1
    if isinstance(rest, Mapping):  # how to write
        return len(lm.tok_encode(prompt)) > lm.max_length - rest.get("max_gen_toks", lm.max_gen_toks)
    return False  # a text, read window by window


def protocol(lm: Any) -> dict[str, Any]:
    """What is the same for every task."""
    return {
        "context_tokens": lm.max_length,
        "truncation": "a prompt that does not fit the context loses its start",
        "batch_size": lm.batch_size,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "lm_eval": version("lm_eval"),
        "chat_template": False,
    }


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the harness's warnings to itself, and what it prints off standard output."""
    own = logging.getLogger("lm_eval")
    level = own.level
    own.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        own.setLevel(level)
