"""Passes that go no further than they must: a module until a layer in it has been seen, blocks one after another."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

Precision = Callable[[], AbstractContextManager]
"""The autocast that a pass ran in."""


_SCALE = 1024.0
"""A power of two: whatever is not rounded to nothing is the same number with it."""


def slopes(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients by float32 leaves of a mean over many tokens, most of which float16 would round to nothing.

    Of SmolLM2-135M's masks, 1,024 tokens in float16: 0.9 of the gradient of channels is wrong as it is, 0.005 so.
    """
    found = torch.autograd.grad(loss * _SCALE, leaves, materialize_grads=True)
    return tuple(gradient / _SCALE for gradient in found)


class EnoughError(Exception):
    """Ends a forward pass that has been seen as far as it is needed."""


def first_output(
    module: nn.Module, hidden: Tensor, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """What a module gives, or the first of what it gives."""
    output = module(hidden, *args, **(kwargs or {}))
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its mode, training or evaluation, back at the end: they need not all be in the same."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within it modules are in evaluation mode, but for those that would need more memory there: the causal LM itself
    (Liger makes no logits in training) and modules that checkpoint.

    Not dropout modules alone go by it: attention, embeddings, NEFTune. Between steps a model is in either mode: an
    evaluation leaves the other one behind. Backward passes belong inside, for what checkpointing computes again must
    be what it was.
    """
    with modes_kept(model):
        for module in model.modules():
            module.training = module is model or isinstance(module, GradientCheckpointingLayer)
        yield


def real_tokens(batch: Any) -> Tensor | None:
    """Which tokens of a batch are no padding, bool, `(rows, tokens)`; None where all are, as far as it says."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask > 0


def inputs_of(
    layer: nn.Module,
    module: nn.Module,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """What `layer` reads while `module` runs on `hidden`; the module runs no further."""
    found: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple) -> None:
        found.append(args[0])
        raise EnoughError

    with removed_after([layer.register_forward_pre_hook(hook)]), suppress(EnoughError):
        first_output(module, hidden, args, kwargs)
    return found[0]


@contextmanager
def outputs_of(layer: nn.Module) -> Iterator[list[Any]]:
    """What `layer` gives within it, a call each."""
    found: list[Any] = []
    with removed_after([layer.register_forward_hook(lambda _layer, _args, output: found.append(output))]):
        yield found


@dataclass(frozen=True, eq=False)
class Calls:
    """What the blocks of a model are called with on one batch.

    `hidden`: before the first block, `(rows, tokens, hidden)`. `of_block`: the other arguments, a block each.
    """

    hidden: Tensor
    of_block: list[tuple[tuple[Any, ...], dict[str, Any]]]


def block_calls(
    blocks: Sequence[nn.Module], forward: Callable[[Any], object], batches: Iterable[Any], to_the_end: bool = False
) -> tuple[list[Calls], Precision]:
    """What every block is called with, a batch each, and the precision (autocast) it is called in.

    Only on the first batch do blocks compute; after it they pass on what they are given, in the form they have shown.

    Args:
        forward: runs the model on one batch.
        to_the_end: let passes end as they do by themselves, as engines that keep weights in parts must see.
    """
    found: list[Calls] = []
    in_tuple: dict[int, bool] = {}
    precision: Precision = nullcontext

    def recording(index: int, own: Callable) -> Callable:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal precision
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            if index == 0:
                found.append(Calls(hidden, []))
                precision = _autocast_as_now(hidden.device.type)
            found[-1].of_block.append((args, {name: _without_cache(name, value) for name, value in kwargs.items()}))
            if index == len(blocks) - 1 and not to_the_end:
                raise EnoughError
            if index in in_tuple:
                return (hidden,) if in_tuple[index] else hidden
            output = own(hidden, *args, **kwargs)
            in_tuple[index] = isinstance(output, tuple)
            return output

        return instead

    with forwards_replaced(blocks, recording):
        for batch in batches:
            with suppress(EnoughError):
                forward(batch)
    return found, precision


def _without_cache(name: str, value: Any) -> Any:
    if name == "use_cache":
        return False
    return None if isinstance(value, Cache) else value


@contextmanager
def forwards_replaced(modules: Sequence[nn.Module], by: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """`by(index, forward)` in place of each module's `forward`."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = by(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def giving(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Within it the module computes nothing, and gives `output`."""
    return forwards_replaced([module], lambda _index, _own: lambda *_args, **_kwargs: output)


def beside(output: Any) -> int | None:
    """How many other things a module gives beside the first in a tuple, `output` being what it gave; None: no tuple."""
    return len(output) - 1 if isinstance(output, tuple) else None


def as_given(first: Tensor, others: int | None) -> Any:
    """`first` in the form a module gives it in; `others`: `beside`, whose place None takes."""
    return first if others is None else (first, *[None] * others)


def _autocast_as_now(device: str) -> Precision:
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype) if enabled else nullcontext()


@contextmanager
def removed_after(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Take hooks off at the end, however it comes."""
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
