"""The metrics of local tasks, as functions of what is kept of every row: so that any resampling of rows can be scored.

Items map a name to an array `(..., rows)`; a metric of them is `(...)`.

choice       acc: share of rows whose label was chosen; macro_f1: F1 of each class, mean over the classes that a row
             has or was given (scikit-learn's `f1_score(average="macro")`)
generation   rouge1, rouge2, rougeL: mean of the rows' F1
text         ppl: exp of -log p per token, every token weighing the same; bits_per_byte: the same per byte of UTF-8, to
             compare models with different tokenizers
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Items = Mapping[str, NDArray[np.float64]]
Metric = Callable[[Items], NDArray[np.float64]]

_LARGEST_EXPONENT = 700.0  # exp of more is no float64


def mean_of(name: str) -> Metric:
    """The mean over rows of one item."""
    return lambda items: items[name].mean(-1)


def macro_f1(items: Items) -> NDArray[np.float64]:
    """From the number of each row's class, `label`, and of the one it was given, `chosen`."""
    label, chosen = items["label"], items["chosen"]
    total, present = np.zeros(label.shape[:-1]), np.zeros(label.shape[:-1])
    for number in range(int(max(label.max(), chosen.max())) + 1):
        is_it, was_chosen = label == number, chosen == number
        rows = is_it.sum(-1) + was_chosen.sum(-1)
        total += 2 * (is_it & was_chosen).sum(-1) / np.maximum(rows, 1)
        present += rows > 0
    return total / present


def token_perplexity(items: Items) -> NDArray[np.float64]:
    """`exp(sum of nll / sum of tokens)`."""
    return np.exp(np.minimum(items["nll"].sum(-1) / items["tokens"].sum(-1), _LARGEST_EXPONENT))


def bits_per_byte(items: Items) -> NDArray[np.float64]:
    """`sum of nll / sum of bytes`, in bits."""
    return items["nll"].sum(-1) / items["bytes"].sum(-1) / math.log(2)


METRICS: dict[str, dict[str, Metric]] = {
    "choice": {"acc": mean_of("acc"), "macro_f1": macro_f1},
    "generation": {name: mean_of(name) for name in ("rougeL", "rouge1", "rouge2")},
    "text": {"ppl": token_perplexity, "bits_per_byte": bits_per_byte},
}
"""By kind of task, the primary metric first."""


def metric_of(kind: str, name: str) -> Metric:
    """The metric called `name` of a task of `kind`; of the harness's own tasks, those with items are means."""
    return METRICS[kind][name] if kind in METRICS else mean_of(name)
