"""Attaching a space to a live model, and taking it off again without a trace."""

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from atp.errors import ATPError, UnsupportedModelError
from atp.layers.compact import CompactLinear, compacted, copies_fit, is_plain
from atp.layers.fused import KINDS, FusedMasks, fuse, fused_masks, is_fusable, unfuse
from atp.layers.masked import AxisMask, LinearMasks, device_of, is_masked, mask_linear, masks_of, unmask_linear
from atp.layers.shared import Shared, shared_inputs
from atp.layers.skipping import Halves
from atp.layers.swapping import has_own_forward
from atp.models import keep_unpacked
from atp.ops.selection import Selection
from atp.structure.live import base_layer, causal_lm, require_unpacked
from atp.structure.space import MLP, Axis, Space
from atp.transfers import together

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
        opens = None if space.stream is None else self.lm.get_submodule(space.structure.stream.embedding)
        self._embedding: nn.Module | None = opens
        self._halves = Halves(space, self.lm)
        self.is_compact = self._lasting = False
        self._adapters_fused = False
        self._blocks: dict[int, nn.Module] = {}
        self._impl = "auto"
        self._put_masks()
        self._guarded = model.base_model if isinstance(model, PeftModel) else None
        for name in _UNLOADING if self._guarded is not None else ():
            setattr(self._guarded, name, _refuse_unloading)

    @property
    def device(self) -> torch.device:
        """Where the masks are."""
        return next(iter(self.masks.values())).device

    def set_masks(self, values: Mapping[str, Tensor]) -> None:
        """Write `values` into the masks in place, forgetting their gradients."""
        if self.is_compact:
            self._put_masks()
        written = together([values[name] for name in self.masks], self.device)
        with torch.no_grad():
            torch._foreach_copy_(list(self.masks.values()), written)
        for leaf in self.masks.values():
            leaf.grad = None

    def require_gradients(self, wanted: bool) -> None:
        """Whether backward gathers the loss's gradient with respect to the masks."""
        for leaf in self.masks.values():
            leaf.requires_grad_(wanted)
            leaf.grad = None

    def decision(self) -> dict[str, Tensor]:
        """A copy of the masks as they stand, on the CPU, in one transfer."""
        values = together([leaf.detach() for leaf in self.masks.values()], torch.device("cpu"))
        return {name: value.clone() for name, value in zip(self.masks, values, strict=True)}

    def fuse_adapters(self) -> None:
        """Compute LoRA and its base layer as one operation from now on, the same up to rounding, where it is plain."""
        self._adapters_fused = True
        self._put_masks()

    def fuse_blocks(self, impl: str) -> bool:
        """Apply masks in norms, residual adds and SwiGLU from now on, the same up to rounding, see `layers.fused`.

        Args:
            impl: of these operations, see `atp.ops.implementation`.

        Returns:
            False, and nothing changes, where no block is of a kind that can.
        """
        blocks = {block.index: self.lm.get_submodule(block.path) for block in self.space.structure.blocks}
        self._blocks = {index: module for index, module in blocks.items() if is_fusable(module)}
        self._impl = impl
        self._put_masks()
        return bool(self._blocks)

    def compact(self, final: bool = False) -> bool:
        """Compute nothing but what the masks, 0 or 1 by now, keep: the same up to rounding, until `set_masks`.

        Args:
            final: whether the masks will stay, so that kept weights are copied once if there is room.

        Returns:
            False, and nothing changes, where the model has layers other than plain linear and plain LoRA ones.
        """
        if self.not_plain():
            return False
        fused = {name for sets in self._fused_sets().values() for name in sets.values()}
        self._lasting = final and self._copies_fit()
        decision = self.decision()
        for path, compact in compacted(self.space, self.lm, decision, fused, self._lasting).items():
            switch = masks_of(self.modules[path]).switch if is_masked(self.modules[path]) else None
            mask_linear(self.modules[path], LinearMasks(None, None, compact, switch))
        for index, kept in self._kept_of_fused(decision).items():
            fuse(self._blocks[index], FusedMasks({}, kept, self._impl))
        self._halves.skip(self._halves.off(decision))
        self.is_compact = True
        return True

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the embedding opens all of the residual stream, whatever the space cuts of it."""
        embedding = self._embedding
        masks = None if embedding is None else masks_of(embedding)
        if embedding is not None:
            unmask_linear(embedding)
        try:
            yield
        finally:
            if embedding is not None and masks is not None:
                mask_linear(embedding, masks)

    def along_stream(self, hidden: Tensor) -> Tensor:
        """`hidden`, `(..., hidden_size)`, without what the masks cut of the whole residual stream."""
        axis = self._axis(self.space.stream, ())
        return hidden if axis is None else axis.apply(hidden)

    def switched_off(self) -> set[str]:
        """Paths of attentions and MLPs that the masks switch off as a whole."""
        return self._halves.off(self.masks)

    def _copies_fit(self) -> bool:
        removed = self.space.sparsity(self.decision())
        weights = sum(base_layer(module).weight.nbytes for module in self.modules.values())
        return copies_fit(self.device, (1.0 - removed) * weights, removed)

    def not_plain(self) -> str | None:
        """Path of a layer that `compact` does not cover, if there is one."""
        return next((path for path, module in self.modules.items() if not is_plain(module)), None)

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Within it no block is fused: masks act at the linear layers that they belong to, where hooks may look."""
        blocks, compact, lasting = self._blocks, self.is_compact, self._lasting
        if not blocks:
            yield
            return
        for block in blocks.values():
            unfuse(block)
        self._blocks, before = {}, self.decision()
        self._put_masks()
        try:
            yield
        finally:
            self._blocks = blocks
            self._put_masks()
            if compact and all(torch.equal(mask, before[name]) for name, mask in self.decision().items()):
                self.compact(final=lasting)

    @contextmanager
    def lifted(self, paths: Iterable[str] | None = None) -> Iterator[None]:
        """Within it layers (of `paths`, or all) compute all they hold, without masks; these are then as they were.

        Of a block that is fused (see `plainly`) all layers or none.
        """
        modules = {path: self.modules[path] for path in (self.modules if paths is None else paths)}
        if paths is None and self._embedding is not None:
            modules[self.space.structure.stream.embedding] = self._embedding
        masked = {module: masks_of(module) for module in modules.values() if is_masked(module)}
        blocks = {block.index: block.path for block in self.space.structure.blocks if block.index in self._blocks}
        holding = [i for i, path in blocks.items() if any(p.startswith(f"{path}.") for p in modules)]
        fused = {self._blocks[index]: fused_masks(self._blocks[index]) for index in holding}
        for module in masked:
            unmask_linear(module)
        skipped = self._halves.restore(modules)
        for block in fused:
            unfuse(block)
        try:
            yield
        finally:
            for module, masks in masked.items():
                mask_linear(module, masks)
            for block, masks_of_block in fused.items():
                fuse(block, masks_of_block)
            self._halves.skip(skipped)

    def remove(self) -> None:
        """Give every layer its own class back."""
        for module in self.modules.values():
            if is_masked(module):
                unmask_linear(module)
        if self._embedding is not None:
            unmask_linear(self._embedding)
        self._halves.restore()
        for block in self._blocks.values():
            unfuse(block)
        for name in _UNLOADING if self._guarded is not None else ():
            delattr(self._guarded, name)

    def _put_masks(self) -> None:
        fused = self._fused_sets()
        elsewhere = {name for sets in fused.values() for name in sets.values()}
        shared = shared_inputs(self.space)
        for linear in self.space.linears:
            module = self.modules[linear.path]
            masks = LinearMasks(
                self._axis(linear.cols, elsewhere, shared.get(linear.path)) if linear.mask_cols else None,
                self._axis(linear.rows, elsewhere) if linear.mask_rows else None,
                CompactLinear() if self._adapters_fused and isinstance(module, LoraLinear) else None,
                self._axis(linear.switch, elsewhere) if linear.mask_switch else None,
            )
            if masks.inputs or masks.outputs or masks.arithmetic or masks.switch:
                mask_linear(module, masks)
            elif is_masked(module):
                unmask_linear(module)
        if self._embedding is not None:
            mask_linear(self._embedding, LinearMasks(None, self._axis(self.space.stream, ())))
        self._halves.restore()
        for index, sets in fused.items():
            leaves = {kind: self.masks[name] for kind, name in sets.items()}
            fuse(self._blocks[index], FusedMasks(leaves, {}, self._impl))
        self.is_compact = False

    def _fused_sets(self) -> dict[int, dict[str, str]]:
        """Names of the group sets that fused blocks take care of, by block and kind."""
        found: dict[int, dict[str, str]] = {index: {} for index in self._blocks}
        for s in self.space.sets:
            if s.block is not None and s.block in found and s.kind in KINDS:
                found[s.block][s.kind] = s.name
        return found

    def _kept_of_fused(self, decision: Mapping[str, Tensor]) -> dict[int, dict[str, Selection]]:
        """What each fused block reads and writes of the stream, by kind, where something of it is gone."""
        chosen = {
            (index, kind): Selection.of(decision[name] > 0)
            for index, sets in self._fused_sets().items()
            for kind, name in sets.items()
            if kind != MLP and not decision[name].all()
        }
        devices = {index: next(block.parameters()).device for index, block in self._blocks.items()}
        kept: dict[int, dict[str, Selection]] = {index: {} for index in self._blocks}
        for device in set(devices.values()):
            there = {place: selection for place, selection in chosen.items() if devices[place[0]] == device}
            for (index, kind), selection in zip(there, Selection.moved(list(there.values()), device), strict=True):
                kept[index][kind] = selection
        return kept

    def _axis(self, axis: Axis | None, elsewhere: Container[str], shared: Shared | None = None) -> AxisMask | None:
        if axis is None or axis.set in elsewhere:
            return None
        return AxisMask.of(axis, self.masks[axis.set], shared)


def _refuse_unloading(*_args: object, **_kwargs: object) -> NoReturn:
    raise ATPError(
        "merging or unloading LoRA here would lose the masks without a word: use atp.export(model, out), which merges"
    )


def attach(model: nn.Module, space: Space) -> Attachment:
    """Put `space`'s masks, all ones, on the linear layers of `model` (bare, LoRA or quantised).

    Outputs stay bitwise what they were until a mask changes. Attach after `get_peft_model`.

    Raises:
        UnsupportedModelError: where the model is attached already, or a layer's forward has been replaced.
    """
    lm = causal_lm(model)
    if attachment_of(lm) is not None:
        raise UnsupportedModelError(
            f"{type(lm).__name__} is being pruned already, by another ATPCallback or by a run that has ended: one "
            "callback is enough, and what a run has made is gone on with from its pruned/ or by atp.load"
        )
    for linear in space.linears:
        if has_own_forward(lm.get_submodule(linear.path)):
            raise UnsupportedModelError(
                f"{linear.path} has been given a forward of its own, as accelerate gives one to layers of a model that "
                "device_map spreads, and a mask on it would do nothing: load the model without device_map"
            )
        require_unpacked(base_layer(lm.get_submodule(linear.path)), linear.path)
    keep_unpacked(lm)
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
