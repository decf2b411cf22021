"""What a plain linear layer computes, LoRA and base as one; once its masks are final, the rows and columns that stay.

y = W[rows][:, cols] x[cols] + s B[rows] (A[:, cols] x[cols]), the values of the masked layer up to rounding. LoRA's A
and B stay the parameters that they were, at full size, so that optimizer states, checkpoints and exports know nothing
of it. What is kept of the base weight is copied where it is needed, in the dtype that the layer computes in: by a call
forwards and again backwards, so that one layer's copy exists at a time and a run needs no more memory than before; once
for all calls where a final decision leaves room for it (`copies_fit`), and on CPUs for calls of few tokens in a row,
beside which copying would cost too much.

Between the layers of one block, KV groups and MLP channels that are gone are not there at all: attention and activation
run on what is left. Residual dimensions are gathered and scattered, or multiplied by zero in the weight where so few
of them are gone that moving the others would cost more.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from atp.errors import UnsupportedModelError
from atp.layers.shared import Shared, shared_inputs
from atp.layers.swapping import own_class
from atp.ops import (
    Selection,
    Weight,
    compact_weight,
    frozen_linear,
    gather_features,
    lora_linear,
    scatter_features,
)
from atp.structure.live import active_adapters, base_layer, is_quantised
from atp.structure.sharding import is_ordinary, is_sharded
from atp.structure.space import KV, MLP, Axis, Space
from atp.transfers import together

WORTH_MOVING = 0.8
"""Residual dimensions are gathered and scattered where no more than this share of them stays."""

WORTH_COPYING_AGAIN = 1024
"""Tokens beside which a copy of the base weight costs little: 1 to 2 % of 2,048 tokens' products on two CPU cores."""

_SEPARATE_READERS = 3
"""q, k and v are layers of their own."""

_HEAD_COUNTS = {"num_heads", "num_key_value_heads"}


@dataclass(frozen=True, eq=False)
class Side:
    """The kept features of one axis.

    Attributes:
        keep: bool, `(features,)`, where the layer computes.
        selection: where they are; None where the others are multiplied by zero instead of left out.
        passed_on: whether the tensor on this side holds kept features only.
        shared: for the layers that read this axis.
    """

    keep: Tensor
    selection: Selection | None
    passed_on: bool
    shared: Shared = field(default_factory=Shared)

    @property
    def index(self) -> Tensor | None:
        """Their positions, where the others are left out."""
        return None if self.selection is None else self.selection.index

    def taken(self, x: Tensor) -> Tensor:
        """What a layer reads of `x`, whose last dimension is this axis: kept features, or `x` as it comes."""
        if self.index is None or self.passed_on:
            return x
        index = self.index
        return self.shared.of(x, lambda x: gather_features(x, index))

    def given(self, y: Tensor) -> Tensor:
        """What a layer that computes `y` gives on: zeros where features are gone, or `y` as it comes."""
        if self.index is None or self.passed_on:
            return y
        return scatter_features(y, self.index, len(self.keep))

    def of(self, weight: Tensor, dim: int) -> Tensor:
        """Kept features of `weight` along `dim`."""
        if self.index is not None:
            return weight.index_select(dim, self.index)
        return weight * self.keep.to(weight.dtype).reshape([-1 if d == dim else 1 for d in range(weight.dim())])


@dataclass(eq=False)
class CompactLinear:
    """One plain layer's kept part, or all of it where neither side loses anything.

    Attributes:
        lasting: whether one copy of the kept weight serves all calls.
        passing: whether a copy serves one call, whatever its size: the weight is whole only during it.
    """

    inputs: Side | None = None
    outputs: Side | None = None
    lasting: bool = False
    passing: bool = False
    _copy: Tensor | None = None

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's output from `x`, whose last dimension holds kept inputs or all of them, as `inputs` says."""
        x = x if self.inputs is None else self.inputs.taken(x)
        weight, bias = self._kept_base(module, x)
        y = self._adapted(module, x, weight, bias)
        return y if self.outputs is None else self.outputs.given(y)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return self.inputs is None and self.outputs is None

    def covers(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """Whether to compute a call of the layer in place of its own `forward`.

        Not where all of the layer is there and somebody looks into it, or it is plain no more.

        Raises:
            UnsupportedModelError: where the call has more than an input (PEFT takes adapter names for every row), and
                only a part of the layer is left to compute it.
        """
        nothing_else = not args and all(value is None for value in kwargs.values())
        if self.is_whole:
            return nothing_else and is_plain(module) and not _is_looked_into(module)
        if nothing_else:
            return True
        raise UnsupportedModelError(
            f"a layer under a final decision was called with {', '.join(kwargs) or 'more than its input'}: "
            "set impl to 'eager'"
        )

    def forget(self) -> None:
        """Copy the base weight anew when it is next needed."""
        self._copy = None

    def _adapted(self, module: Any, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """What the base layer gives and adapters add to it: one operation where there is one, of the same precision."""
        adapters = active_adapters(module)
        if len(adapters) == 1 and not _drops(module.lora_dropout[adapters[0]]):
            a, b = self._kept_adapter(module, adapters[0])
            if _computing_dtype(x, a) == (dtype := _computing_dtype(x, base_layer(module).weight)):
                x, a, b = (t.to(dtype) for t in (x, a, b))
                return lora_linear(x, weight, bias, a, b, module.scaling[adapters[0]])
        y = frozen_linear(x, weight, bias)
        for name in adapters:
            a, b = self._kept_adapter(module, name)
            dropped = self._dropped(module.lora_dropout[name], x.to(a.dtype))
            y = y + (linear(linear(dropped, a), b) * module.scaling[name]).to(y.dtype)
        return y

    def _kept_adapter(self, module: Any, name: str) -> tuple[Tensor, Tensor]:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        a = a if self.inputs is None else self.inputs.of(a, 1)
        b = b if self.outputs is None else self.outputs.of(b, 0)
        return a, b

    def _dropped(self, dropout: nn.Module, x: Tensor) -> Tensor:
        """LoRA's dropout, drawn over all inputs: the same numbers, and as many, as the masked layer draws."""
        inputs = self.inputs
        if inputs is None or inputs.index is None or not _drops(dropout):
            return dropout(x)
        factors = dropout(x.new_ones(*x.shape[:-1], len(inputs.keep)))
        return x * gather_features(factors, inputs.index)

    def _kept_base(self, module: nn.Module, x: Tensor) -> tuple[Weight, Tensor | None]:
        """Kept weight, or what copies it, and kept bias."""
        if isinstance(module, LoraLinear) and module.merged and module.disable_adapters:
            module.unmerge()  # as PEFT does
        base = base_layer(module)
        dtype = _computing_dtype(x, base.weight)
        if self.is_whole or (isinstance(module, LoraLinear) and module.merged):
            return self._weight(base, dtype), self._bias(base, dtype)
        if not self._keeps_copy(x):
            self.forget()
            return partial(self._weight, base, dtype), self._bias(base, dtype)
        if self._copy is None or self._copy.dtype != dtype:
            self._copy = self._weight(base, dtype)
        return self._copy, self._bias(base, dtype)

    def _keeps_copy(self, x: Tensor) -> bool:
        few = x.is_cpu and x.numel() < WORTH_COPYING_AGAIN * x.shape[-1]
        return not self.passing and (self.lasting or few)

    @torch.no_grad()
    def _weight(self, base: nn.Linear, dtype: torch.dtype) -> Tensor:
        weight: Tensor = base.weight
        sides = (self.outputs, self.inputs)
        if any(sides) and all(side is None or side.selection is not None for side in sides):
            rows, cols = (None if side is None else side.selection for side in sides)
            return compact_weight(weight, rows, cols).to(dtype)  # on a GPU in one pass over it
        for dim, side in enumerate(sides):
            if side is not None:
                weight = side.of(weight, dim)
        return weight.to(dtype)

    @torch.no_grad()
    def _bias(self, base: nn.Linear, dtype: torch.dtype) -> Tensor | None:
        bias: Tensor | None = base.bias
        if bias is None:
            return None
        return (bias if self.outputs is None else self.outputs.of(bias, 0)).to(dtype)


def compacted(
    space: Space, lm: nn.Module, masks: Mapping[str, Tensor], fused: set[str], lasting: bool
) -> dict[str, CompactLinear]:
    """What is left of every layer that loses something, by path.

    Args:
        lm: the causal LM that holds the layers, all of them plain (`is_plain`).
        masks: a hard decision, 0 or 1, `(size,)` per group set, on the CPU.
        fused: sets that blocks take care of: kept features are all that their layers are given and give.
        lasting: whether one copy of what is kept serves all calls.
    """
    passed_on = {name for name in _passed_on(space, lm) if masks[name].any()} | fused  # attention cannot have no heads
    shared = shared_inputs(space)
    weights = {layer.path: base_layer(lm.get_submodule(layer.path)).weight for layer in space.linears}
    kept = _kept({axis for layer in space.linears for axis in (layer.cols, layer.rows) if axis}, masks, passed_on)
    there = {device: _on(device, kept) for device in {weight.device for weight in weights.values()}}
    found = {}
    for layer in space.linears:
        weight = weights[layer.path]
        inputs, outputs = (there[weight.device].get(axis) for axis in (layer.cols, layer.rows))
        if inputs is not None and layer.path in shared:
            inputs = replace(inputs, shared=shared[layer.path])
        if inputs is not None or outputs is not None:
            passing = is_sharded(weight)
            found[layer.path] = CompactLinear(inputs, outputs, lasting and not passing, passing)
    return found


def copies_fit(device: torch.device, copies: float, removed: float) -> bool:
    """Whether lasting copies take no more than half of what fewer activations will leave free.

    Those had what the process holds of the GPU and does not use now; on CPUs, where nobody knows, copies do not fit.

    Args:
        copies: bytes of all.
        removed: the share of prunable parameters that is gone, and about that of the activations.
    """
    if device.type != "cuda":
        return False
    activations = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return copies <= removed / 2 * activations


def is_plain(module: nn.Module) -> bool:
    """Whether a layer, masked or not, computes W x + b, frozen, or that plus plain LoRA, in floating point."""
    base = base_layer(module)
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return False
    if own_class(base) is not nn.Linear or is_quantised(base) or not is_ordinary(base.weight):
        return False
    if module is base:
        return True
    if own_class(module) is not LoraLinear:
        return False
    lora: Any = module
    return not lora.lora_variant and all(layer.bias is None for layer in lora.lora_B.values())


def _passed_on(space: Space, lm: nn.Module) -> set[str]:
    """Sets whose removed groups need not exist between the layers that make and read them.

    MLP channels, and heads, but where attention counts on all of them: a norm spans them, their projections are packed
    into one (and split by head counts), or the module keeps head counts of its own.
    """
    made = Counter(layer.rows.set for layer in space.linears if layer.rows is not None)
    fixed = {norm.axis.set for norm in space.norms}
    inside = {s.name for s in space.sets if s.kind == MLP and s.name in made}
    for s in space.sets:
        if s.kind == KV and s.block is not None:
            attention = lm.get_submodule(space.structure.blocks[s.block].attention.path)
            if made[s.name] >= _SEPARATE_READERS and not _HEAD_COUNTS & vars(attention).keys():
                inside.add(s.name)
    return inside - fixed


def _kept(axes: Iterable[Axis], masks: Mapping[str, Tensor], passed_on: set[str]) -> dict[Axis, Side]:
    """Of axes that lose features those that stay, on the CPU: counting on a GPU would wait for it."""
    sides = {}
    for axis in axes:
        if (masks[axis.set] > 0).all():
            continue
        keep = masks[axis.set][axis.owner] > 0
        inside = axis.set in passed_on
        leave_out = inside or keep.float().mean() <= WORTH_MOVING
        sides[axis] = Side(keep, Selection.of(keep) if leave_out else None, inside)
    return sides


def _on(device: torch.device, kept: Mapping[Axis, Side]) -> dict[Axis | None, Side]:
    """The same, there; nothing of no axis."""
    keeps = together([side.keep for side in kept.values()], device)
    selections = iter(Selection.moved([side.selection for side in kept.values() if side.selection is not None], device))
    moved: dict[Axis | None, Side] = {}
    for (axis, side), keep in zip(kept.items(), keeps, strict=True):
        moved[axis] = Side(keep, None if side.selection is None else next(selections), side.passed_on)
    return moved


def _is_looked_into(module: Any) -> bool:
    """Whether a module inside a LoRA layer has hooks, or a `forward` that somebody has put in its place."""
    inner = (module.get_base_layer(), *module.lora_A.values(), *module.lora_B.values())
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in inner)


def _drops(dropout: nn.Module) -> bool:
    return dropout.training and not isinstance(dropout, nn.Identity)


def _computing_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
