"""Calibration data: rows held out of the training set, or given; batches of them; and the check against evaluation.

Holding out needs no change to the user's script: the training sampler is wrapped so that a held-out row never comes
up; its neighbour does instead, so the number of steps stays what it was.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from atp.data import causal
from atp.errors import CalibrationError, in_one_line

MOST_HELD_OUT = 0.1
"""At most this share of the training rows is held out."""

_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of tokens, the last three of TRL's preference pairs."""


class Calibration:
    """Batches for the generator and for criteria.

    Args:
        rows: dataset rows, as the training set holds them.
        collate: makes a model's keyword arguments from a list of rows.
        batch_size: rows per batch.
    """

    def __init__(self, rows: Sequence[Any], collate: Callable[[list[Any]], Mapping[str, Any]], batch_size: int) -> None:
        if not indexable(rows):
            raise CalibrationError("calibration_dataset streams: give rows that can be taken by number, such as a list")
        if len(rows) < batch_size:
            raise CalibrationError(
                f"{len(rows)} calibration rows are fewer than calibration_batch_size={batch_size}: "
                "give more rows or lower it"
            )
        self._rows, self._collate, self._batch_size = rows, collate, batch_size
        try:
            first = self.batch(0)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"calibration rows cannot be made into a batch ({in_one_line(error)}): prepare them as the training "
                "set is by the time it reaches the Trainer (of TRL's trainers, take rows of trainer.train_dataset)"
            ) from error
        if "labels" not in first:
            raise CalibrationError(
                "calibration batches have no labels, so the model returns no loss: calibration rows must be prepared "
                "like a training set for language modelling (tokenised, with the same data collator)"
            )

    def batch(self, index: int) -> Mapping[str, Any]:
        """Batch number `index`; they repeat after the last row, and depend on nothing but the index."""
        start = index * self._batch_size
        return self._collated(range(start, start + self._batch_size))

    def _collated(self, numbers: Iterable[int]) -> Mapping[str, Any]:
        return causal(self._collate([self._rows[number % len(self._rows)] for number in numbers]))

    def __len__(self) -> int:
        """Batches of all rows."""
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Every row once; the last batch may be smaller."""
        starts = range(0, len(self._rows), self._batch_size)
        return (self._collated(range(start, min(start + self._batch_size, len(self._rows)))) for start in starts)

    def and_also(self, dataset: Any, indices: Iterable[int], rows: int) -> "Calibration":
        """These rows and others of `dataset`, in the order of `indices`, up to `rows` in all."""
        own = [self._rows[i] for i in range(len(self._rows))]
        return Calibration([*own, *self.others(dataset, indices, rows - len(own))], self._collate, self._batch_size)

    def others(self, dataset: Any, indices: Iterable[int], count: int) -> list[Any]:
        """Rows of `dataset` that are none of these, in the order of `indices`, `count` where there are as many."""
        own = self.hashes()
        others = (row for row in map(dataset.__getitem__, indices) if row_hash(row) not in own)
        return list(itertools.islice(others, max(count, 0)))

    def first_tokens(self, count: int) -> list[dict[str, Tensor]]:
        """Batches of one-token inputs, `(tokens of a batch, 1)`, from the first rows, `count` in all where they reach.

        What a model does with a first token, which every later one may attend to when there is nothing to attend to
        (attention sinks, arXiv 2309.17453), is its own, and a row shows but one.
        """
        found: list[dict[str, Tensor]] = []
        for batch in self:
            if count <= 0:
                break
            tokens, mask = batch["input_ids"], batch.get("attention_mask")
            if mask is None or mask.shape != tokens.shape:  # no padding, or a mask of pairs of tokens
                mask = torch.ones_like(tokens)
            tokens = tokens[mask.bool()][:count]
            count -= len(tokens)
            found.append({"input_ids": tokens[:, None]})
        return found

    def hashes(self) -> set[str]:
        """Content hash of every row."""
        return {row_hash(self._rows[i]) for i in range(len(self._rows))}


def indexable(dataset: Any) -> bool:
    """Whether rows can be taken by number; of PyTorch's iterable sets they cannot, though these may have a length."""
    has_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return has_rows and not isinstance(dataset, IterableDataset)


def with_columns_of(given: Any, dataset: Any) -> Any:
    """`given` with no columns that `dataset`, prepared like it, has not: the Trainer has taken unused ones from it."""
    if not (isinstance(given, Dataset) and isinstance(dataset, Dataset)):
        return given
    shared = [name for name in dataset.column_names if name in given.column_names]
    return given.select_columns(shared) if shared else given


def row_hash(row: Any) -> str:
    """Hash of a row's tokens (or of the whole row where it has none), blind to padding and to extra columns."""
    columns = [row[name] for name in _TOKENS if name in row] if isinstance(row, Mapping) else []
    content = [column.tolist() if isinstance(column, Tensor) else column for column in columns or [row]]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def shared_row(calibration: set[str], evaluation: Any) -> int | None:
    """The first row of the evaluation set that is also a calibration row."""
    return next((i for i in range(len(evaluation)) if row_hash(evaluation[i]) in calibration), None)


def hold_out(loader: DataLoader, rows: int, batch_size: int, seed: int) -> list[int]:
    """Hold out up to `rows` rows of the training set, at most a tenth of it; the loader never yields them again.

    Returns:
        Their indices, ascending; the same for the same seed and data set.
    """
    dataset: Any = loader.dataset
    if not indexable(dataset):
        raise CalibrationError(
            "rows cannot be held out of a streaming training set: pass ATPCallback(config, calibration_dataset=...)"
        )
    if rows < batch_size:
        raise CalibrationError(
            f"calibration_rows={rows} is less than calibration_batch_size={batch_size}: raise one or lower the other"
        )
    wanted = min(rows, int(len(dataset) * MOST_HELD_OUT))
    if wanted < batch_size:
        raise CalibrationError(
            f"the training set's {len(dataset)} rows are too few to hold out {batch_size} for calibration: "
            "give a calibration set (data.calibration, ATPCallback(calibration_dataset=...)) or lower "
            "calibration_batch_size"
        )
    owner = _owner_of_sampler(loader)
    if isinstance(owner.sampler, _HoldOutSampler):
        owner.sampler = owner.sampler.inner
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    held = sorted(order[:wanted].tolist())
    owner.sampler = _HoldOutSampler(owner.sampler, held, len(dataset))
    return held


def _owner_of_sampler(loader: DataLoader) -> BatchSampler:
    """The batch sampler that draws row indices, under whatever accelerate wrapped around it."""
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # a shard of one process: its own `sampler` is a copy that nobody asks
        sampler = sampler.batch_sampler
    if not hasattr(sampler, "sampler"):
        raise CalibrationError(
            "rows cannot be held out of this training sampler: pass ATPCallback(config, calibration_dataset=...)"
        )
    return sampler


class _HoldOutSampler(Sampler[int]):
    """Yields what `inner` yields, with every held-out index replaced by the next one that is not."""

    def __init__(self, inner: Iterable[int], held: Sequence[int], length: int) -> None:
        self.inner = inner
        self._instead: dict[int, int] = {}
        taken = set(held)
        for index in held:
            other = index
            while other in taken:
                other = (other + 1) % length
            self._instead[index] = other

    def __iter__(self) -> Iterator[int]:
        return (self._instead.get(index, index) for index in self.inner)

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """`set_epoch`, `generator` and the like are the inner sampler's."""
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
