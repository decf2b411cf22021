"""Masked linear layers: y = layer(x * s_in) * s_out, for any layer class, by swapping a live module's class.

A PEFT LoRA layer is masked as a whole, so the masks act on the base path and the LoRA path alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atp.layers.compact import CompactLinear
from atp.layers.shared import Shared
from atp.layers.swapping import restore_forward, swap_forward
from atp.structure.space import Axis

_SLOT = "_atp_masks"


@dataclass(frozen=True, eq=False)
class AxisMask:
    """One axis's mask: `leaf` has shape `(groups,)`; `owner` expands it to features, or is None where it need not.

    `shared` is for the layers that read this axis.
    """

    leaf: Tensor
    owner: Tensor | None
    shared: Shared = field(default_factory=Shared)

    @classmethod
    def of(cls, axis: Axis, leaf: Tensor, shared: Shared | None = None) -> "AxisMask":
        """The mask of `axis`, living on the leaf's device."""
        return cls(leaf, None if axis.is_identity else axis.owner_on(leaf.device), shared or Shared())

    def apply(self, x: Tensor) -> Tensor:
        """`x * mask` along the last dimension, as `masked` gives it."""
        return self.shared.of(x, self._times, (self.leaf._version, self.leaf.requires_grad))

    def _times(self, x: Tensor) -> Tensor:
        alone = self.owner is None or len(self.leaf) == 1
        mask = self.leaf if alone else self.leaf[self.owner]
        return masked(x, mask)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x * mask` in the dtype of `x`, whose gradient with respect to `mask` is one of float32; see `_InHalf`."""
    return _InHalf.apply(x, mask) if x.dtype == torch.float16 else x * mask.to(x.dtype)


@dataclass(frozen=True, eq=False)
class LinearMasks:
    """The masks of one linear layer (or, of outputs, of an embedding); any may be absent.

    Attributes:
        arithmetic: what computes the layer in place of its own `forward`, where there is one.
        switch: of all outputs at once.
    """

    inputs: AxisMask | None
    outputs: AxisMask | None
    arithmetic: CompactLinear | None = None
    switch: AxisMask | None = None


def mask_linear(module: nn.Module, masks: LinearMasks) -> None:
    """Make `module` multiply its inputs and outputs by `masks` from now on, instead of by those it had, if any."""
    swap_forward(module, "Masked", _masked_forward)
    object.__setattr__(module, _SLOT, masks)


def unmask_linear(module: nn.Module) -> None:
    """Undo `mask_linear`."""
    restore_forward(module)
    object.__delattr__(module, _SLOT)


def masks_of(module: nn.Module) -> LinearMasks:
    """The masks that `mask_linear` has put on this very module."""
    return module.__dict__[_SLOT]


def base_changed(module: nn.Module) -> None:
    """To be called where the base weight of a layer has changed: what computes only the kept part copies it anew."""
    if is_masked(module) and (arithmetic := masks_of(module).arithmetic) is not None:
        arithmetic.forget()


def is_masked(module: nn.Module) -> bool:
    """Whether `mask_linear` is in force on this very module."""
    return _SLOT in module.__dict__


def _masked_forward(cls: type[nn.Module]) -> Callable:
    def forward(self: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        masks = masks_of(self)
        if masks.inputs is not None:
            x = masks.inputs.apply(x)
        if masks.arithmetic is not None and masks.arithmetic.covers(self, args, kwargs):
            y = masks.arithmetic.forward(self, x)
        else:
            y = cls.forward(self, x, *args, **kwargs)
        y = y if masks.outputs is None else masks.outputs.apply(y)
        return y if masks.switch is None else masks.switch.apply(y)

    return forward


def device_of(module: nn.Module) -> torch.device:
    """Where a layer computes."""
    return next(module.parameters()).device


class _InHalf(torch.autograd.Function):
    """x * mask in float16, whose mask's gradient, a sum over all tokens and times a loss scale, is one of float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x * mask.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (of_y,), (x, mask) = gradients, ctx.saved_tensors
        of_x, of_mask = ctx.needs_input_grad
        return (
            of_y * mask.to(of_y.dtype) if of_x else None,
            (of_y.float() * x.float()).sum_to_size(mask.shape).to(mask.dtype) if of_mask else None,
        )
