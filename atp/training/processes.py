"""What the processes of one run tell each other: few numbers, and never more for more tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed


def alone() -> bool:
    """Whether this is the only process."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


@torch.no_grad()
def summed(tensor: Tensor) -> Tensor:
    """`tensor` added up over processes, in place."""
    if not alone():
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors averaged over processes, all in one message."""
    if alone() or not tensors:
        return dict(tensors)
    together = summed(torch.cat(list(tensors.values()))) / distributed.get_world_size()
    return dict(zip(tensors, together.split([len(t) for t in tensors.values()]), strict=True))


@torch.no_grad()
def from_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the first process holds, vectors of one dtype, in one message: rounding may have set others apart."""
    if alone() or not tensors:
        return dict(tensors)
    together = torch.cat(list(tensors.values()))
    distributed.broadcast(together, src=0)
    return dict(zip(tensors, together.split([len(t) for t in tensors.values()]), strict=True))
