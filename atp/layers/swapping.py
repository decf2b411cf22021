"""Another `forward` for one live module, by swapping its class for one derived from it.

No parameter, buffer or submodule is added: state-dict keys, adapters and `isinstance` stay as they were, and
`torch.compile` sees an ordinary `forward`.
"""

from collections.abc import Callable
from functools import cache

from torch import nn

_OVER = "_atp_over"
"""Attribute of a swapped-in class: the class that it stands in for."""

MakeForward = Callable[[type[nn.Module]], Callable]


def swap_forward(module: nn.Module, prefix: str, make: MakeForward) -> None:
    """Let `make(the module's class)` be its `forward`; nothing changes where it is that already.

    Args:
        prefix: of the new class's name.
    """
    module.__class__ = _swapped(own_class(module), prefix, make)  # type: ignore[arg-type]  # classes do hash


def restore_forward(module: nn.Module) -> None:
    """Undo `swap_forward`."""
    module.__class__ = own_class(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a `forward` has been put on the module itself: its class's, swapped or not, is then not called."""
    return "forward" in vars(module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether or not it has been swapped."""
    return type(module).__dict__.get(_OVER, type(module))


@cache
def _swapped(cls: type[nn.Module], prefix: str, make: MakeForward) -> type[nn.Module]:
    return type(f"{prefix}{cls.__name__}", (cls,), {"forward": make(cls), _OVER: cls, "__module__": cls.__module__})
