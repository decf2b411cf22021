"""What a recovery did, in figures: how far the pruned stream is from the teacher's, and how good the model is.

A smaller error on calibration text is not a better model (Shin et al., EMNLP 2024), so every figure is taken on
held-out text too, and on text of another domain where there is some.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

CHUNK = 256
"""Tokens whose distributions are held at a time."""


@dataclass(frozen=True)
class Error:
    """Of a stream, where the teacher's is the truth: `error`, its mean square over tokens and features, and `relative`,
    the mean over tokens of |difference|^2 / |teacher's|^2.

    Each token counts by its own norm there: that of a first token can be a thousand times that of all others
    (massive activations, arXiv 2402.17762), and would be all that is seen.
    """

    error: float
    relative: float


@dataclass(frozen=True)
class Quality:
    """On one text: nats a token, `perplexity = exp(nll)`, and KL(teacher || model), nats a token."""

    nll: float
    perplexity: float
    kl: float


def stream_error(stream: Iterable[Tensor], truth: Iterable[Tensor]) -> Error:
    """The error of `stream`, batches of `(rows, tokens, hidden)`."""
    square, relative, tokens, features = 0.0, 0.0, 0, 1
    for ours, theirs in zip(stream, truth, strict=True):
        off = (ours.float() - theirs.float()).square().sum(-1)
        size = theirs.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        square += off.sum(dtype=torch.float64).item()
        relative += (off / size).sum(dtype=torch.float64).item()
        tokens, features = tokens + off.numel(), ours.shape[-1]
    return Error(square / (tokens * features), relative / tokens)


@torch.no_grad()
def quality(model: PreTrainedModel, teacher: PreTrainedModel, batches: list[Tensor], device: str) -> Quality:
    """Of `model`, on windows of ids, `(rows, tokens)`."""
    nll, kl, tokens = 0.0, 0.0, 0
    for row in (row for ids in batches for row in ids[:, None].to(device)):
        logits, wanted = (_logits(each, row) for each in (model, teacher))
        for own, truth, label in zip(*(part.split(CHUNK) for part in (logits, wanted, row[0, 1:])), strict=True):
            q, p = own.float().log_softmax(-1), truth.float().log_softmax(-1)
            nll += cross_entropy(own.float(), label, reduction="sum").double().item()
            kl += kl_div(q, p, reduction="sum", log_target=True).double().item()
        tokens += row.shape[1] - 1
    return Quality(nll / tokens, math.exp(min(nll / tokens, 700.0)), kl / tokens)


def _logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    output: Any = model(input_ids=row, use_cache=False)
    return output.logits[0, :-1]
