"""Streams: hidden states of many windows before one block, a batch at a time; large ones lie on the disk."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atp.recovery.pairs import Half

IN_MEMORY = 1 << 29
"""Bytes of a stream that is held in memory; larger ones lie on the disk."""

STREAMS = ".stream."
"""How the folders of those begin."""


class Stream:
    """Hidden states by the number of their batch, `(rows, tokens, hidden)`, on the CPU.

    Args:
        nbytes: of all batches.
        folder: for temporary files.
    """

    def __init__(self, nbytes: int, folder: Path) -> None:
        large = nbytes > IN_MEMORY
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix=STREAMS) if large else None
        self._batches: dict[int, Tensor] = {}
        self._nbytes = nbytes
        self._room = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def opening(cls, half: Half, batches: Mapping[int, Tensor], folder: Path) -> "Stream":
        """What a model's first block is given, for batches of ids, `(rows, tokens)`."""
        tokens = sum(ids.numel() for ids in batches.values())
        weight = half.lm.get_input_embeddings().weight
        stream = cls(tokens * weight.shape[1] * weight.element_size(), folder)
        for index, ids in batches.items():
            stream[index] = half.opening(ids)
        return stream

    @property
    def nbytes(self) -> int:
        """Of all batches."""
        return sum(batch.nbytes for batch in self._batches.values())

    @property
    def indices(self) -> list[int]:
        """Numbers of its batches, in their order."""
        return list(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return self.of(self.indices)

    def of(self, indices: Iterable[int]) -> Iterator[Tensor]:
        """These batches."""
        return (self[index] for index in indices)

    def __getitem__(self, index: int) -> Tensor:
        batch = self._batches[index]
        if self._folder is None:
            return batch
        loaded = np.fromfile(self._file(index), dtype=np.uint8)
        return torch.from_numpy(loaded).view(batch.dtype).view(batch.shape)

    def __setitem__(self, index: int, batch: Tensor) -> None:
        batch = batch.detach().cpu().contiguous()
        if self._folder is not None:
            batch.view(torch.uint8).numpy().tofile(self._file(index))
            self._batches[index] = batch.to("meta")
        elif (held := self._batches.get(index)) is not None and held.dtype == batch.dtype:
            held.copy_(batch)
        else:
            self._batches[index] = self._own(batch)

    def _own(self, batch: Tensor) -> Tensor:
        """A copy, in memory that all batches share: pieces by themselves leave holes that the process never returns."""
        if len(self._room) < batch.nbytes:
            self._room = torch.empty(max(self._nbytes, batch.nbytes), dtype=torch.uint8)
        copy, self._room = self._room[: batch.nbytes], self._room[batch.nbytes :]
        return copy.view(batch.dtype).view(batch.shape).copy_(batch)

    def mapped(self, by: Callable[[Tensor], Tensor], folder: Path) -> "Stream":
        """A new stream of what `by` gives for each batch."""
        new = Stream(self.nbytes, folder)
        for index in self.indices:
            new[index] = by(self[index])
        return new

    def pass_on(self, by: Callable[[Tensor], Tensor]) -> None:
        """What `by` gives for each batch takes its place."""
        for index in self.indices:
            self[index] = by(self[index])

    def _file(self, index: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / str(index)
