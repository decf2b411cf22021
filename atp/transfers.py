"""Many small tensors to another device at once: each by itself would wait for all that the device has to do."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_ALIGNED = 16
"""Elements that parts begin at multiples of, where a kernel reads them: 16 bytes at least."""


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors`, vectors on one device, on another: one transfer for all of a dtype. They may share memory there."""
    if all(tensor.device == device for tensor in tensors):
        return list(tensors)
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        members = {i: tensor for i, tensor in enumerate(tensors) if tensor.dtype == dtype}
        aligned = 1 if device.type == "cpu" else _ALIGNED
        padded = [pad(t, (0, rest)) if (rest := -len(t) % aligned) else t for t in members.values()]
        parts = torch.cat(padded).to(device).split([len(part) for part in padded])
        found |= {i: part[: len(members[i])] for i, part in zip(members, parts, strict=True)}
    return [found[i] for i in range(len(tensors))]
