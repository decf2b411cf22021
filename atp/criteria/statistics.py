"""Statistics of what linear layers read: one pass over calibration batches, nothing kept but sums.

Every token counts the same, padding included: give calibration rows that fill their windows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Moments:
    """Running sums over tokens of a layer's inputs, `(in_features,)`, float32 on the CPU."""

    tokens: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean input."""
        return self.total / max(self.tokens, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of the inputs over tokens."""
        return (self.squares / max(self.tokens, 1) - self.mean.square()).clamp_min(0.0)


def input_moments(
    layers: Mapping[str, nn.Module], forward: Callable[[Any], object], batches: Iterable[Any]
) -> dict[str, Moments]:
    """First and second moments of the inputs of `layers`, by name; `forward(batch)` runs the model once."""
    moments: dict[str, Moments] = {}

    def see(name: str, x: Tensor) -> None:
        total, squares = x.sum(0).cpu(), x.square().sum(0).cpu()
        if name in moments:
            moments[name].tokens += len(x)
            moments[name].total += total
            moments[name].squares += squares
        else:
            moments[name] = Moments(len(x), total, squares)

    with torch.no_grad(), watched_inputs(layers, see):
        for batch in batches:
            forward(batch)
    return moments


@contextmanager
def watched_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with every input of each layer, flattened to `(tokens, in_features)` and in float32.

    Masked layers show what comes in before their mask is applied.
    """

    def hook(name: str) -> Callable:
        return lambda _module, inputs: see(name, inputs[0].detach().flatten(0, -2).float())

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
