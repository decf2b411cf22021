"""What several layers read alike, computed once: q, k and v mask or gather one tensor, gate and up another."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from atp.structure.space import Space


@dataclass(eq=False)
class _Computed:
    x: Tensor
    key: Hashable
    y: Tensor
    readers_left: int


class Shared:
    """f(x) for the `readers` of one x, who ask one after another: kept until all have asked, or one with another x."""

    def __init__(self, readers: int = 1) -> None:
        self._readers = readers
        self._last: _Computed | None = None

    def of(self, x: Tensor, compute: Callable[[Tensor], Tensor], state: Hashable = None) -> Tensor:
        """`compute(x)`, or what it gave for this very x, unchanged since then.

        Args:
            state: what else the value depends on.
        """
        if self._readers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return compute(x)
        key, last = (x._version, torch.is_grad_enabled(), state), self._last
        if last is None or last.x is not x or last.key != key:
            last = _Computed(x, key, compute(x), self._readers)
        last.readers_left -= 1
        self._last = last if last.readers_left else None
        return last.y


def shared_inputs(space: Space) -> dict[str, Shared]:
    """By path of a layer whose inputs a group set owns: one for the layers that read the same in the same half."""
    halves = {layer.path: (layer.cols.set, layer.path.rpartition(".")[0]) for layer in space.linears if layer.cols}
    readers = Counter(halves.values())
    shared = {half: Shared(count) for half, count in readers.items()}
    return {path: shared[half] for path, half in halves.items()}
