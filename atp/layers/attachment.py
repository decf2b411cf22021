"""Attaching a space to a live model, and taking it off again without a trace."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from atp.errors import ATPError, UnsupportedModelError
from atp.layers.compact import CompactLinear, compacted, is_plain
from atp.layers.masked import AxisMask, LinearMasks, device_of, is_masked, mask_linear, masks_of, unmask_linear
from atp.layers.shared import Shared, shared_by_set
from atp.structure.live import causal_lm
from atp.structure.space import Axis, Space

_SLOT = "_atp_attachment"
_UNLOADING = ("merge_and_unload", "unload")
"""PEFT's ways to put base layers back in place of the LoRA layers that carry the masks."""


class Attachment:
    """A model under masks.

    Attributes:
        space: the table that the masks belong to.
        lm: the causal LM, without PEFT's wrapper.
        masks: one leaf tensor per group set, `(size,)`, float32, all ones at first. The layers read these very
            tensors: write into them with `set_masks`.
        modules: the live layers by path (LoRA layers where PEFT put one).
        is_compact: whether layers compute only what is kept, see `compact`.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        self.space = space
        self.lm = causal_lm(model)
        self.modules = {linear.path: self.lm.get_submodule(linear.path) for linear in space.linears}
        device = device_of(next(iter(self.modules.values())))
        self.masks: dict[str, Tensor] = {s.name: torch.ones(s.size, device=device) for s in space.sets}
        self.is_compact = False
        self._fused = False
        self._shared = shared_by_set(space)
        self._put_masks()
        self._guarded = model.base_model if isinstance(model, PeftModel) else None
        for name in _UNLOADING if self._guarded is not None else ():
            setattr(self._guarded, name, _refuse_unloading)

    def set_masks(self, values: Mapping[str, Tensor]) -> None:
        """Write `values` into the masks in place, forgetting their gradients."""
        if self.is_compact:
            self._put_masks()
        with torch.no_grad():
            for name, leaf in self.masks.items():
                leaf.copy_(values[name])
                leaf.grad = None

    def require_gradients(self, wanted: bool) -> None:
        """Whether backward gathers the loss's gradient with respect to the masks."""
        for leaf in self.masks.values():
            leaf.requires_grad_(wanted)
            leaf.grad = None

    def decision(self) -> dict[str, Tensor]:
        """A copy of the masks as they stand, on the CPU."""
        return {name: leaf.detach().cpu().clone() for name, leaf in self.masks.items()}

    def fuse_adapters(self) -> None:
        """Compute LoRA and its base layer as one operation from now on, the same up to rounding, where it is plain."""
        self._fused = True
        self._put_masks()

    def compact(self) -> bool:
        """Compute nothing but what the masks, 0 or 1 by now, keep: the same up to rounding, until `set_masks`.

        Returns:
            False, and nothing changes, where the model has layers other than plain linear and plain LoRA ones.
        """
        if self.not_plain():
            return False
        for path, compact in compacted(self.space, self.lm, self.masks, self._shared).items():
            mask_linear(self.modules[path], LinearMasks(None, None, compact))
        self.is_compact = True
        return True

    def not_plain(self) -> str | None:
        """Path of a layer that `compact` does not cover, if there is one."""
        return next((path for path, module in self.modules.items() if not is_plain(module)), None)

    @contextmanager
    def lifted(self, paths: Iterable[str] | None = None) -> Iterator[None]:
        """Within it layers (of `paths`, or all) compute all they hold, without masks; these are then as they were."""
        modules = {path: self.modules[path] for path in (self.modules if paths is None else paths)}
        masked = {path: masks_of(module) for path, module in modules.items() if is_masked(module)}
        for path in masked:
            unmask_linear(self.modules[path])
        try:
            yield
        finally:
            for path, masks in masked.items():
                mask_linear(self.modules[path], masks)

    def remove(self) -> None:
        """Give every layer its own class back."""
        for module in self.modules.values():
            if is_masked(module):
                unmask_linear(module)
        for name in _UNLOADING if self._guarded is not None else ():
            delattr(self._guarded, name)

    def _put_masks(self) -> None:
        for linear in self.space.linears:
            module = self.modules[linear.path]
            masks = LinearMasks(
                self._axis(linear.cols, self._shared) if linear.mask_cols else None,
                self._axis(linear.rows, {}) if linear.mask_rows else None,
                CompactLinear() if self._fused and isinstance(module, LoraLinear) else None,
            )
            if masks.inputs or masks.outputs or masks.arithmetic:
                mask_linear(module, masks)
            elif is_masked(module):
                unmask_linear(module)
        self.is_compact = False

    def _axis(self, axis: Axis | None, shared: Mapping[str, Shared]) -> AxisMask | None:
        return None if axis is None else AxisMask.of(axis, self.masks[axis.set], shared.get(axis.set))


def _refuse_unloading(*_args: object, **_kwargs: object) -> NoReturn:
    raise ATPError(
        "merging or unloading LoRA here would lose the masks without a word: use atp.export(model, out), which merges, "
        "or call atp.layers.detach(model) first"
    )


def attach(model: nn.Module, space: Space) -> Attachment:
    """Put `space`'s masks, all ones, on the linear layers of `model` (bare, LoRA or quantised).

    Outputs stay bitwise what they were until a mask changes. Attach after `get_peft_model`.

    Raises:
        UnsupportedModelError: where the model is attached already.
    """
    lm = causal_lm(model)
    if attachment_of(lm) is not None:
        raise UnsupportedModelError(f"{type(lm).__name__} is already attached: call atp.layers.detach(model) first")
    attachment = Attachment(model, space)
    object.__setattr__(lm, _SLOT, attachment)
    return attachment


def detach(model: nn.Module) -> None:
    """Take the masks off; outputs, modules and state-dict keys are again those of the untouched model."""
    lm = causal_lm(model)
    attachment = attachment_of(lm)
    if attachment is None:
        raise ATPError(f"{type(lm).__name__} is not attached: there is nothing to detach")
    attachment.remove()
    object.__delattr__(lm, _SLOT)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of `model`, if it has one."""
    return causal_lm(model).__dict__.get(_SLOT)
