"""Halves of blocks that are switched off for good: attention or an MLP that computes nothing and writes zeros.

Where a cache is in use, attention computes after all (its writer is masked), so that every block has as much in it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from atp.layers.swapping import restore_forward, swap_forward
from atp.structure.space import Space


class Halves:
    """The halves of a model's blocks that its space can switch off; all compute until `skip`."""

    def __init__(self, space: Space, lm: nn.Module) -> None:
        self._switch = {linear.path: linear.switch.set for linear in space.linears if linear.switch is not None}
        self._modules: dict[str, tuple[str, nn.Module, Callable]] = {}
        for block in space.structure.blocks:
            for half, forward in ((block.attention, _attention_forward), (block.mlp, _mlp_forward)):
                if half.writer.path in self._switch:
                    found = (half.writer.path, lm.get_submodule(half.path), forward)
                    self._modules[half.path] = found
        self._skipped: set[str] = set()

    def off(self, decision: Mapping[str, Tensor]) -> set[str]:
        """Paths of the halves that `decision` switches off."""
        return {p for p, (writer, _, _) in self._modules.items() if not decision[self._switch[writer]].any()}

    def skip(self, paths: Iterable[str]) -> None:
        """Compute nothing in these, until `restore`."""
        for path in paths:
            _, module, forward = self._modules[path]
            swap_forward(module, "Skipped", forward)
            self._skipped.add(path)

    def restore(self, within: Iterable[str] | None = None) -> set[str]:
        """Let halves compute again: those that hold any of the layers `within`, or all.

        Returns:
            Paths of those that did not compute.
        """
        layers = None if within is None else list(within)
        held = {p for p in self._skipped if layers is None or any(layer.startswith(f"{p}.") for layer in layers)}
        for path in held:
            restore_forward(self._modules[path][1])
        self._skipped -= held
        return held


def _attention_forward(cls: type[nn.Module]) -> Callable:
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in ("past_key_values", "layer_past")):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return hidden_states.new_zeros(hidden_states.shape), None

    return forward


def _mlp_forward(_cls: type[nn.Module]) -> Callable:
    def forward(_self: nn.Module, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)

    return forward
