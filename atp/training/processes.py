"""What the processes of one run tell each other: few numbers, and never more for more tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def alone() -> bool:
    """Whether this is the only process."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


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
