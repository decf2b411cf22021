"""Token-weighted perplexity: exp(sum of -log p over all label tokens / number of label tokens).

Every label token weighs the same, whatever batch or row it is in; a mean of batch losses would not do that. Token t is
predicted from tokens before t, so the first token of a row is never counted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from atp.errors import DataError

_IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """`perplexity = exp(nll)`; `nll` is in nats per token; `tokens` counts label tokens.

    `tokens_per_second` counts every token that went through the model.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    tokens_per_second: float


def perplexity(
    model: PreTrainedModel, dataset: Sequence[Mapping[str, Any]], batch_size: int = 8, progress: bool = True
) -> Perplexity:
    """Measure `model` on rows of `input_ids` and `labels` (-100 is not counted).

    Raises:
        DataError: where no token has a label.
    """
    was_training = model.training
    model.eval()
    total, tokens, seen, start = 0.0, 0, 0, time.perf_counter()
    try:
        for first in tqdm(
            range(0, len(dataset), batch_size),
            desc="perplexity",
            unit="batch",
            disable=not progress,
            leave=False,
            delay=1,
        ):
            rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
            nll, count = _batch_nll(model, rows)
            total, tokens, seen = total + nll, tokens + count, seen + sum(len(row["input_ids"]) for row in rows)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise DataError("no token has a label: there is nothing to measure; give longer rows or label the prompt too")
    seconds = time.perf_counter() - start
    return Perplexity(math.exp(min(total / tokens, 700.0)), total / tokens, tokens, seconds, seen / seconds)


@torch.no_grad()
def _batch_nll(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Sum of -log p over the label tokens of a batch, and their number."""
    ids = _padded(rows, "input_ids", 0).to(model.device)
    labels = _padded(rows, "labels", _IGNORED).to(model.device)[:, 1:]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=model.device)
    attention_mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    counted = labels != _IGNORED
    nll = cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return nll.double().sum().item(), int(counted.sum())


def _padded(rows: Sequence[Mapping[str, Any]], column: str, value: int) -> Tensor:
    """`(rows, longest)`, padded on the right."""
    return pad_sequence([torch.as_tensor(row[column]) for row in rows], batch_first=True, padding_value=value)
