"""The same few held-out rows, seen by the dense model and by the pruned one, while a run goes on.

Dense is the model with nothing pruned: its base weights as they were at first, with its adapters as they are. Masks,
gradients, modes and random streams are afterwards as they were. Several processes look at a share of the rows each.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from atp.data import causal, learned_tokens
from atp.layers import Attachment
from atp.passes import evaluating
from atp.processes import dealt, summed
from atp.randomness import drawn_aside
from atp.training.compensation import Compensation


class HeldOut:
    """Measures one model on rows that never change.

    Args:
        model: what the Trainer calls, attached.
        rows: prepared like the training set.
        collate: makes the model's keyword arguments from a list of rows.
        batch_size: rows a forward pass.
        paused: within it, passes teach nobody anything.
    """

    def __init__(
        self,
        model: nn.Module,
        attachment: Attachment,
        compensation: Compensation,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Mapping[str, Any]],
        batch_size: int,
        paused: Callable[[], Any] = nullcontext,
    ) -> None:
        self._model, self._attachment, self._compensation = model, attachment, compensation
        self._rows, self._collate, self._batch_size, self._paused = list(rows), collate, batch_size, paused

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._rows)

    @property
    def is_labelled(self) -> bool:
        """Whether there is anything to predict in them."""
        with self._untouched():  # a collator may draw
            return all(batch.get("labels") is not None for batch in itertools.islice(self._batches(), 1))

    def dense(self) -> float | None:
        """Log-perplexity with nothing pruned, nats a token; None where base weights that were changed stay so."""
        if not self._compensation.is_undoable:
            return None
        with self._attachment.lifted(), self._compensation.undone():
            return self.pruned()

    def pruned(self) -> float:
        """Log-perplexity under the masks as they are, nats a token."""
        total, tokens = self.by_batch().sum(dim=0).tolist()
        return total / tokens if tokens else float("nan")

    @torch.no_grad()
    def by_batch(self) -> Tensor:
        """Under the masks as they are: `(batches, 2)`, nats of a batch's tokens, and how many these are."""
        found = torch.zeros(-(-len(self._rows) // self._batch_size), 2, dtype=torch.float64)
        with self._untouched():
            for one in dealt(self._batches()):
                loss = self._model(**one.batch).loss
                learned = learned_tokens(one.batch)
                if learned and one.counts:
                    found[one.index] = torch.tensor([loss.double().item() * learned, learned], dtype=torch.float64)
        return summed(found)

    def _batches(self) -> Iterator[dict[str, Any]]:
        device = next(self._model.parameters()).device
        for first in range(0, len(self._rows), self._batch_size):
            batch = causal(self._collate(self._rows[first : first + self._batch_size]))
            yield send_to_device(dict(batch), device)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        with evaluating(self._model), drawn_aside(self._model), self._paused():
            yield
