"""What the processes of one run tell each other, never more for more tokens; and what each looks at of many batches."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, distributed

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Dealt(Generic[Batch]):
    """A batch that this process is to look at.

    Attributes:
        index: of the batch among all.
        counts: False where another process counts it: it is passed through only because engines that hold weights in
            parts want as many passes of every process.
    """

    index: int
    batch: Batch
    counts: bool


def alone() -> bool:
    """Whether this is the only process."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def place() -> tuple[int, int]:
    """This process's number, from 0, and how many processes there are."""
    return (0, 1) if alone() else (distributed.get_rank(), distributed.get_world_size())


def dealt(batches: Iterable[Batch]) -> Iterator[Dealt[Batch]]:
    """This process's share of batches that all of them have, as many as every other process's, dealt in turn.

    Sums over the batches that count are to be `summed` afterwards. Where there are fewer batches than processes, every
    process counts all of them: means are what they should be.
    """
    rank, processes = place()
    round_: list[Batch] = []
    start = 0
    for batch in batches:
        round_.append(batch)
        if len(round_) == processes:
            yield Dealt(start + rank, round_[rank], True)
            start += processes
            round_ = []
    if start == 0:
        yield from (Dealt(index, batch, True) for index, batch in enumerate(round_))
    elif round_:
        own = min(rank, len(round_) - 1)
        yield Dealt(start + own, round_[own], own == rank)


def counted(number: int) -> int:
    """`number` added up over processes."""
    return int(summed(torch.tensor([number])).item())


def least(number: int) -> int:
    """The smallest of what processes have for `number`."""
    if alone():
        return number
    sent = _sendable(torch.tensor([number]))
    distributed.all_reduce(sent, distributed.ReduceOp.MIN)
    return int(sent.item())


@torch.no_grad()
def summed(tensor: Tensor) -> Tensor:
    """`tensor` added up over processes."""
    if alone():
        return tensor
    sent = _sendable(tensor)
    distributed.all_reduce(sent)
    return sent.to(tensor.device)


@torch.no_grad()
def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors averaged over processes, all in one message."""
    if alone() or not tensors:
        return dict(tensors)
    return _apart(summed(torch.cat(list(tensors.values()))) / distributed.get_world_size(), tensors)


@torch.no_grad()
def from_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the first process holds, vectors of one dtype, in one message: rounding may have set others apart."""
    if alone() or not tensors:
        return dict(tensors)
    together = torch.cat(list(tensors.values()))
    sent = _sendable(together)
    distributed.broadcast(sent, src=0)
    return _apart(sent.to(together.device), tensors)


def _apart(together: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, together.split([len(tensor) for tensor in tensors.values()]), strict=True))


def _sendable(tensor: Tensor) -> Tensor:
    """A copy where the backend can take it: NCCL takes nothing from the CPU."""
    backends = distributed.get_backend_config()  # such as "cuda:nccl", or "cpu:gloo,cuda:gloo"
    if f"{tensor.device.type}:" in backends:
        return tensor.clone()
    return tensor.to(torch.accelerator.current_accelerator())
