"""Token-weighted perplexity: exp(sum of -log p over all label tokens / number of label tokens).

Every label token weighs the same, whatever batch or row it is in; a mean of batch losses would not do that. Token t is
predicted from tokens before t, so the first token of a row is never counted.

A mean hides rows on which a pruned model breaks down: a model without a BOS whose first token no longer draws the
attention that heads have to spare (the attention sink, arXiv 2309.17453) loses three nats on that row and is healthy on
the next. `nll_stderr` and `worst_row_nll` show it.
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
from atp.passes import evaluating

_IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """`perplexity = exp(nll)`; `nll` is in nats per token; `tokens` counts label tokens.

    `nll_stderr` is its standard error when rows are what was sampled (`None` with a single row that has labels), and
    `worst_row_nll` the highest of any row. `tokens_per_second` counts every token that went through the model.
    """

    perplexity: float
    nll: float
    nll_stderr: float | None
    worst_row_nll: float
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
    return perplexity_by_row(model, dataset, batch_size, progress)[0]


def perplexity_by_row(
    model: PreTrainedModel, dataset: Sequence[Mapping[str, Any]], batch_size: int = 8, progress: bool = True
) -> tuple[Perplexity, Tensor]:
    """As `perplexity`, and each row's sum of -log p and number of label tokens, `(rows, 2)`, float64 on the CPU."""
    measured: list[Tensor] = []
    seen, start = 0, time.perf_counter()
    with evaluating(model):
        for first in tqdm(
            range(0, len(dataset), batch_size),
            desc="perplexity",
            unit="batch",
            disable=not progress,
            leave=False,
            delay=1,
        ):
            rows = [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]
            measured.append(_by_row(model, rows))
            seen += sum(len(row["input_ids"]) for row in rows)
    by_row = torch.cat(measured or [torch.zeros(0, 2)])
    return _summed(by_row, seen, time.perf_counter() - start), by_row


def _summed(by_row: Tensor, seen: int, seconds: float) -> Perplexity:
    sums, counts = by_row[by_row[:, 1] > 0].T
    if len(counts) == 0:
        raise DataError("no token has a label: there is nothing to measure; give longer rows or label the prompt too")
    nll = (sums.sum() / counts.sum()).item()
    return Perplexity(
        perplexity=math.exp(min(nll, 700.0)),
        nll=nll,
        nll_stderr=_standard_error(sums, counts),
        worst_row_nll=(sums / counts).max().item(),
        tokens=int(counts.sum()),
        seconds=seconds,
        tokens_per_second=seen / seconds,
    )


def _standard_error(sums: Tensor, counts: Tensor) -> float | None:
    """Of the ratio of two sums over rows, to first order (Cochran, Sampling Techniques, 1977, eq. 6.13)."""
    rows = len(counts)
    if rows == 1:
        return None
    off = sums - sums.sum() / counts.sum() * counts
    return (off.square().sum() * rows / (rows - 1)).sqrt().item() / counts.sum().item()


@torch.no_grad()
def _by_row(model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Sum of -log p over each row's label tokens, and their number, `(rows, 2)`, float64 on the CPU."""
    ids = _padded(rows, "input_ids", 0).to(model.device)
    labels = _padded(rows, "labels", _IGNORED).to(model.device)[:, 1:]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=model.device)
    attention_mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    counted = labels != _IGNORED
    nll = cross_entropy(logits[counted].float(), labels[counted], reduction="none").double().cpu()
    row = torch.nonzero(counted)[:, 0].cpu()
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, nll)
    return torch.stack([sums, counted.sum(1).double().cpu()], dim=1)


def _padded(rows: Sequence[Mapping[str, Any]], column: str, value: int) -> Tensor:
    """`(rows, longest)`, padded on the right."""
    return pad_sequence([torch.as_tensor(row[column]) for row in rows], batch_first=True, padding_value=value)
