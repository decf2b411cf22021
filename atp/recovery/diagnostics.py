"""What a recovery did, in figures: how far the pruned stream is from the teacher's, and how good the model is.

A smaller error on calibration text is not a better model (Shin et al., EMNLP 2024), so every figure is taken on
held-out text too, and on text of another domain where there is some.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss


@dataclass(frozen=True)
class Error:
    """Of a stream, where the teacher's is the truth: `error`, its mean square over tokens and features, and `relative`,
    the mean over tokens of |difference|^2 / |teacher's|^2, a token counting 1 at most.

    Norms of a few tokens are a thousand times those of others (massive activations, arXiv 2402.17762), and where one
    model has them the other may not: each counts by its own norm, and no more than one that is lost altogether.
    """

    error: float
    relative: float

    @property
    def finite(self) -> bool:
        """Whether the stream is numbers."""
        return math.isfinite(self.error)


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
        wanted = theirs.to(ours.device).float()
        off = (ours.float() - wanted).square().sum(-1)
        size = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        square += off.sum(dtype=torch.float64).item()
        relative += (off / size).clamp_max(1.0).sum(dtype=torch.float64).item()
        tokens, features = tokens + off.numel(), ours.shape[-1]
    return Error(square / (tokens * features), relative / tokens)


class QualitySum:
    """Sums over tokens, some at a time."""

    def __init__(self) -> None:
        self._nll, self._kl, self._tokens = 0.0, 0.0, 0

    def add(self, labels: Tensor, logits: Tensor, teachers: Tensor) -> None:
        """More of them: what comes next, `(tokens,)`, and both models' logits for it, `(tokens, vocabulary)`."""
        q, p = logits.float().log_softmax(-1), teachers.float().log_softmax(-1)
        self._nll += nll_loss(q, labels, reduction="sum").double().item()
        self._kl += kl_div(q, p, reduction="sum", log_target=True).double().item()
        self._tokens += len(labels)

    def mean(self) -> Quality:
        """Of all tokens."""
        nll = self._nll / self._tokens
        return Quality(nll, math.exp(min(nll, 700.0)), self._kl / self._tokens)
