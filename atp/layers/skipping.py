"""Halves of blocks that are switched off for good: attention or an MLP that computes nothing and writes zeros.

Where a cache is in use, attention computes after all (its writer is masked), so that every block has as much in it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

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
        if any(isinstance(value, Cache) for value in kwargs.values()):
            return cls.forward(self, hidden_states, *args, **kwargs)
        return _zeros(self, hidden_states), None

    return forward


def _mlp_forward(_cls: type[nn.Module]) -> Callable:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return _zeros(self, x)

    return forward


def _zeros(module: nn.Module, like: Tensor) -> Tensor:
    return _NoEffect.apply(like.new_zeros(like.shape), *(p for p in module.parameters() if p.requires_grad))


class _NoEffect(torch.autograd.Function):
    """Its first input; gradients of the others are zeros, not absent: DDP waits for every parameter's."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros_like(p) for p in ctx.saved_tensors)
