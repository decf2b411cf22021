"""Statistics of what linear layers read, and of the loss's slope at what they write, over calibration batches.

Nothing is kept but sums. Every token counts the same, and padding does not count.
Where several processes run, all are given the same batches; each looks at its share, and all end with the sums of all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atp.passes import real_tokens, removed_after
from atp.processes import counted, dealt, least, summed
from atp.structure.live import base_layer

Batches = Iterable[Any]
"""Batches that can be passed through the model more than once."""


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
    layers: Mapping[str, nn.Module], forward: Callable[[Any], object], batches: Batches
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

    with torch.no_grad():
        _pass_through(batches, forward, partial(_watched_inputs, layers, see))
    return {name: Moments(counted(m.tokens), summed(m.total), summed(m.squares)) for name, m in moments.items()}


@contextmanager
def _watched_inputs(
    layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None], real: Tensor | None
) -> Iterator[None]:
    """Call `see(name, x)` with every input of each layer, flattened to `(tokens, in_features)` and in float32.

    Masked layers show what comes in before their mask is applied. `real`: tokens that are seen; None: all.
    """

    def hook(name: str) -> Callable:
        return lambda _module, inputs: see(name, _flat(inputs[0], real))

    with removed_after([layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]):
        yield


@dataclass(eq=False)
class Curvature:
    """Kronecker factors of the loss's curvature in a layer's weight (K-FAC, arXiv 1503.05671), means over tokens.

    Attributes:
        inputs: mean of x xᵀ over tokens, `(in_features, in_features)`, float32, where the layer computes.
        gradients: mean of d dᵀ, d the gradient of the summed loss with respect to the layer's output,
            `(out_features, out_features)`.
    """

    inputs: Tensor
    gradients: Tensor


def curvatures(
    layers: Mapping[str, nn.Module],
    loss: Callable[[Any], Tensor],
    leaves: Sequence[Tensor],
    batches: Batches,
    budget_bytes: int | None = None,
) -> Iterator[tuple[str, Curvature]]:
    """Curvature of each of `layers`, by name, in their order.

    No more than `budget_bytes` of factors are held at a time (by default a third of a GPU's free memory, or 8 GiB on a
    CPU): beyond that the rows are passed through again.

    Args:
        loss: the model's loss on one batch, added up over labels, so that a token counts the same in every batch.
        leaves: tensors that require gradients and that every layer's output depends on.
    """
    waiting = dict(layers)
    while waiting:
        ready = _first_that_fit(waiting, budget_bytes)
        tokens, steps = dict.fromkeys(ready, 0), dict.fromkeys(ready, 0)
        now = {name: waiting.pop(name) for name in ready}
        _pass_through(
            batches,
            lambda batch: torch.autograd.grad(loss(batch), leaves),
            partial(_watched_curvature, now, ready, tokens, steps),
        )
        while ready:
            name = next(iter(ready))
            found, read, written = ready.pop(name), max(counted(tokens[name]), 1), max(counted(steps[name]), 1)
            yield name, Curvature(summed(found.inputs).div_(read), summed(found.gradients).div_(written))


def input_grams(
    layers: Mapping[str, nn.Module],
    forward: Callable[[Any], object],
    batches: Batches,
    budget_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As `curvatures`, but only sums of x xᵀ, `(in_features, in_features)`, from forward passes."""
    waiting = dict(layers)
    while waiting:
        ready = {name: c.inputs for name, c in _first_that_fit(waiting, budget_bytes).items()}

        def see(name: str, x: Tensor, ready: dict[str, Tensor] = ready) -> None:
            ready[name].addmm_(x.T, x)

        with torch.no_grad():
            _pass_through(batches, forward, partial(_watched_inputs, {name: waiting.pop(name) for name in ready}, see))
        while ready:
            name = next(iter(ready))
            yield name, summed(ready.pop(name))


def _pass_through(
    batches: Batches, through: Callable[[Any], object], watched: Callable[[Tensor | None], AbstractContextManager]
) -> None:
    """Pass this process's share of the batches through, those that count within `watched(real_tokens(batch))`."""
    for one in dealt(batches):
        with watched(real_tokens(one.batch)) if one.counts else nullcontext():
            through(one.batch)


def _flat(x: Tensor, real: Tensor | None) -> Tensor:
    """`(tokens, features)` of `(rows, tokens, features)`, float32, without those that are not `real`."""
    found = x.detach().flatten(0, -2).float()
    return found if real is None or real.numel() != len(found) else found[real.flatten().to(found.device)]


@contextmanager
def _watched_curvature(
    layers: Mapping[str, nn.Module],
    found: Mapping[str, Curvature],
    tokens: dict[str, int],
    steps: dict[str, int],
    real: Tensor | None,
) -> Iterator[None]:
    """Add to `found`, to `tokens` with every forward pass, and to `steps` with every backward pass.

    Under gradient checkpointing there are two forward passes of most layers to a backward pass.
    """

    def hook(name: str) -> Callable:
        def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = _flat(inputs[0], real)
            found[name].inputs.addmm_(x.T, x)
            tokens[name] += len(x)

            def backward_hook(gradient: Tensor) -> None:
                d = _flat(gradient, real)
                found[name].gradients.addmm_(d.T, d)
                steps[name] += len(d)

            output.register_hook(backward_hook)

        return forward_hook

    with removed_after([layer.register_forward_hook(hook(name)) for name, layer in layers.items()]):
        yield


def _first_that_fit(waiting: Mapping[str, nn.Module], budget_bytes: int | None) -> dict[str, Curvature]:
    """Zeros for the first layers that fit the budget; for at least one."""
    ready: dict[str, Curvature] = {}
    held = 0
    if budget_bytes is None:
        budget_bytes = _spare_bytes(base_layer(next(iter(waiting.values()))).weight.device)
    for name, layer in waiting.items():
        base = base_layer(layer)
        held += 4 * (base.in_features**2 + base.out_features**2)
        if ready and held > budget_bytes:
            break
        inputs, gradients = (
            torch.zeros(size, size, device=base.weight.device) for size in (base.in_features, base.out_features)
        )
        ready[name] = Curvature(inputs, gradients)
    return ready


def fits(kept: Mapping[str, Tensor], another: Tensor) -> bool:
    """Whether `another` statistic can be kept beside those that are."""
    return sum(t.nbytes for t in kept.values()) + another.nbytes <= _spare_bytes(another.device)


def _spare_bytes(device: torch.device) -> int:
    """The same for all processes, so that they take the same layers at a time."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # the allocator's to give
        return least((torch.cuda.mem_get_info(device)[0] + unused) // 3)
    return 8 << 30
