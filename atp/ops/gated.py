"""The gated product inside an MLP (SwiGLU and GEGLU, arXiv 2002.05202), with the MLP's mask, as one operation.

    y = act(gate) * up * mask

`gated_eager` is the definition. Kernels read and write everything once, forwards and backwards: the activation is
recomputed from `gate` and `up`, and nothing else is kept for the backward pass. They cover neither second derivatives
nor float64, which is left to the definition.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from atp.ops.implementation import uses_triton

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh")}


def gated(
    gate: Tensor, up: Tensor, mask: Tensor | None = None, *, activation: str = "silu", impl: str = "auto"
) -> Tensor:
    """act(gate) * up * mask, `(..., features)`, computed in float32 and returned in `gate`'s dtype.

    Args:
        gate: `(..., features)`; like `up` it may be half of a packed `(..., 2 * features)` tensor, read where it lies.
        up: `(..., features)`.
        mask: `(features,)`, soft or hard, of any float dtype.
        activation: one of `ACTIVATIONS`.
        impl: see `atp.ops.implementation`.

    Raises:
        ValueError: on an unknown activation, shapes that disagree, or an `impl` that cannot be had.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or (mask is not None and mask.shape != gate.shape[-1:]):
        shapes = [tuple(t.shape) for t in (gate, up, mask) if t is not None]
        raise ValueError(f"gate, up and mask are (..., features) twice and (features,), not {shapes}")
    if uses_triton(gate, impl) and gate.dtype != torch.float64:
        return _gated(gate, up, mask, activation)
    return gated_eager(gate, up, mask, activation=activation)


def gated_eager(gate: Tensor, up: Tensor, mask: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """The definition of `gated`."""
    precise = torch.promote_types(gate.dtype, torch.float32)
    y = ACTIVATIONS[activation](gate.to(precise)) * up.to(precise)
    if mask is not None:
        y = y * mask.to(precise)
    return y.to(gate.dtype)


@torch.library.custom_op("atp::gated", mutates_args=())
def _gated(gate: Tensor, up: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    from atp.ops.kernels import gated as kernels  # noqa: PLC0415 - triton is optional

    return kernels.forward(gate, up, mask, activation)


@torch.library.custom_op("atp::gated_backward", mutates_args=())
def _gated_backward(
    of_y: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None, activation: str, needs_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate`, `up` and, where it is needed, `mask`: otherwise that one is empty."""
    from atp.ops.kernels import gated as kernels  # noqa: PLC0415 - triton is optional

    return kernels.backward(of_y, gate, up, mask, activation, needs_mask)


@_gated.register_fake
def _(gate: Tensor, up: Tensor, mask: Tensor | None, activation: str) -> Tensor:  # noqa: ARG001 - the operation's
    return gate.new_empty(gate.shape)


@_gated_backward.register_fake
def _(
    of_y: Tensor,  # noqa: ARG001 - the operation's
    gate: Tensor,
    up: Tensor,
    mask: Tensor | None,
    activation: str,  # noqa: ARG001
    needs_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_mask = mask.new_empty(mask.shape) if mask is not None and needs_mask else gate.new_empty(0)
    return gate.new_empty(gate.shape), up.new_empty(up.shape), of_mask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's
    gate, up, mask, ctx.activation = inputs
    ctx.save_for_backward(gate, up, mask)


def _backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
    gate, up, mask = ctx.saved_tensors
    needs_mask = ctx.needs_input_grad[2]
    of_gate, of_up, of_mask = _gated_backward(of_y, gate, up, mask, ctx.activation, needs_mask)
    return of_gate, of_up, of_mask if needs_mask else None, None


_gated.register_autograd(_backward, setup_context=_setup_context)
