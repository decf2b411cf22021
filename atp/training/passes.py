"""Passes that go no further than they must: a module run until a layer in it has been seen."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from atp.criteria.statistics import removed_after


class EnoughError(Exception):
    """Ends a forward pass that has been seen as far as it is needed."""


def first_output(
    module: nn.Module, hidden: Tensor, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """What a module gives, or the first of what it gives."""
    output = module(hidden, *args, **(kwargs or {}))
    return output[0] if isinstance(output, tuple) else output


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
