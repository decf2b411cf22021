"""Compaction: a live model and its decision -> the tensors of the smaller dense model.

Adapters are merged in float32; rows and columns of pruned groups are left out. Because the masks act on the base
path and the LoRA path alike, the result computes what the masked model computes.

A norm over all heads (OLMo 2) divides by the root of sum(x^2) / H. With H' features left, its source is scaled by
c = sqrt(H'/H) and its weight by 1/c: the root is then unchanged, and so is `eps`. Likewise where the residual stream
itself is cut, for all that is added to it and all that reads it (`structure.stream`).

Where attention or an MLP is switched off its layers are left out, and where both are the whole block: the blocks that
remain are counted anew.

The live model is left bit for bit as it was. Where parameters are sharded over processes, making a tensor is
collective. Not covered: DoRA or `lora_bias` on a quantised layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.errors import UnsupportedModelError
from atp.export.remaining import Remaining
from atp.export.stream import stream_cuts
from atp.layers.compact import is_plain
from atp.structure.live import active_adapters, base_layer, dequantised_weight, is_quantised, require_unpacked
from atp.structure.sharding import gathered
from atp.structure.space import ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, VALUE, Axis, Space

SELECTIONS = {"attention": (ATTENTION_IN, ATTENTION_OUT), "mlp": (MLP_IN, MLP_OUT)}
"""Space `disp`: what each half of a block reads from and writes to the residual stream."""

_ONLY_PLAIN = "{}: only plain LoRA can be merged into a quantised layer: load the base model unquantised to export"


@dataclass(frozen=True, eq=False)
class Sides:
    """What stays of a layer: rows and columns (None: all), and factors of its weight and of what is beside it."""

    rows: Tensor | None = None
    cols: Tensor | None = None
    weight: float = 1.0
    rest: float = 1.0


class CompactTensors:
    """Tensors of the smaller model, on the CPU, in the base weights' dtype, each made when it is asked for.

    What is not pruned is the live tensor itself where it lies on the CPU: treat the values as read-only.

    Args:
        masks: a hard decision, per group set `(size,)` of zeros and ones.
        adapters: merge the active ones; without, the base as it is under them.

    Attributes:
        names: state-dict names, those of one module side by side.
        new_name: gives the name of a live tensor in the smaller model, None where it is gone.
    """

    def __init__(
        self, lm: PreTrainedModel, space: Space, masks: Mapping[str, Tensor], *, adapters: bool = True
    ) -> None:
        kept = {name: torch.nonzero(mask.detach().cpu()).flatten() for name, mask in masks.items()}
        self._kept, self._indices = kept, _feature_indices(kept)
        self._linears = {linear.path: linear for linear in space.linears}
        self._norms = {norm.path: norm for norm in space.norms}
        self._source_scale = {norm.source: _rms_ratio(norm.axis, kept) for norm in space.norms}
        self._dtype = _rest_dtype(lm)
        self._modules = dict(_modules(lm, "", adapters))
        self._cuts = stream_cuts(lm, space, masks)
        self._selections = _residual_selections(space, kept) | _value_selections(space, self._indices)
        self.new_name = new_name = Remaining(space, masks).new_name
        self._owner = {
            new: (path, name)
            for path, module in self._modules.items()
            for name in _names(module)
            if (new := new_name(f"{path}.{name}" if path else name)) is not None
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def names(self) -> list[str]:
        """State-dict names, those of one module side by side."""
        return [*self._owner, *self._selections]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            UnsupportedModelError: naming a layer whose adapter cannot be merged.
        """
        if name in self._selections:
            return self._selections[name]
        path, own = self._owner[name]
        if self._last[0] != path or own not in self._last[1]:
            self._last = ("", {})  # gone before the next ones are made
            with gathered(self._modules[path]):
                self._last = (path, self._made(path))
        return self._last[1][own].detach().cpu()

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor of that name, which is not made for it."""
        if name in self._selections:
            return self._selections[name].dtype
        path, own = self._owner[name]
        module = base_layer(self._modules[path])
        return self._dtype if is_quantised(module) else _own_tensors(module)[own].dtype

    def sides(self, path: str) -> Sides:
        """What stays of a linear layer."""
        linear = self._linears.get(path)
        if linear is None:
            return Sides()
        scale, cut = self._source_scale.get(path, 1.0), self._cuts.get(path)
        weight, rest = (scale, scale) if cut is None else (scale * cut.weight, scale * cut.rest)
        return Sides(self._indices(linear.rows), self._indices(linear.cols), weight, rest)

    def is_cut(self, path: str) -> bool:
        """Whether a module other than a prunable linear layer loses dimensions of the residual stream."""
        return path in self._cuts and path not in self._linears

    def _made(self, path: str) -> dict[str, Tensor]:
        module = self._modules[path]
        if path in self._linears:
            sides = self.sides(path)
            if is_plain(module):
                return _scaled(_merged_plain(module, path, sides.rows, sides.cols), sides)
            return _scaled(_sliced(self._whole(path), sides.rows, sides.cols), sides)
        if path in self._cuts:
            return self._cuts[path].of(self._whole(path))
        if path in self._norms:
            axis = self._norms[path].axis
            sides = Sides(weight=1.0 / _rms_ratio(axis, self._kept))
            return _scaled(_sliced(self._whole(path), self._indices(axis), None), sides)
        return self._whole(path)

    def _whole(self, path: str) -> dict[str, Tensor]:
        """What a module holds, adapters merged, nothing left out."""
        module = self._modules[path]
        if isinstance(module, BaseTunerLayer):
            return _merged(module, path, self._dtype)
        if is_quantised(module):
            return _dequantised(base_layer(module), path, self._dtype)
        return _own_tensors(module)


def _feature_indices(kept: Mapping[str, Tensor]) -> Callable[[Axis | None], Tensor | None]:
    """The kept features of an axis, or None where the axis is not pruned."""

    def indices(axis: Axis | None) -> Tensor | None:
        return None if axis is None else torch.nonzero(torch.isin(axis.owner, kept[axis.set])).flatten()

    return indices


def _rms_ratio(axis: Axis, kept: Mapping[str, Tensor]) -> float:
    """c = sqrt(H'/H)."""
    return math.sqrt(len(kept[axis.set]) * axis.units / len(axis.owner))


def _sliced(own: Mapping[str, Tensor], rows: Tensor | None, cols: Tensor | None) -> dict[str, Tensor]:
    """A layer's weight and bias without pruned rows and columns."""
    return {name: _cut(tensor, rows, cols if tensor.ndim == 2 else None) for name, tensor in own.items()}


def _cut(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    tensor = tensor if rows is None else tensor.index_select(0, rows.to(tensor.device))
    return tensor if cols is None else tensor.index_select(1, cols.to(tensor.device))


def _scaled(own: Mapping[str, Tensor], sides: Sides) -> dict[str, Tensor]:
    return {name: _times(tensor, sides.weight if name == "weight" else sides.rest) for name, tensor in own.items()}


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _value_selections(space: Space, indices: Callable[[Axis | None], Tensor | None]) -> dict[str, Tensor]:
    """Space `values`: which rows of values, and columns of the writer, each attention has kept."""
    linears = {linear.path: linear for linear in space.linears}
    tensors: dict[str, Tensor] = {}
    for block in space.structure.blocks if VALUE in space.kinds else ():
        attention = block.attention
        assert attention.value_reader is not None
        rows, columns = linears[attention.value_reader.path].rows, linears[attention.writer.path].cols
        found = {"value_rows": indices(rows), "value_columns": indices(columns)}
        tensors |= {f"{attention.path}.{name}": index for name, index in found.items() if index is not None}
    return tensors


def _residual_selections(space: Space, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Space `disp`: the indices that gather before an attention or MLP and scatter after it."""
    names = {(s.block, s.kind): s.name for s in space.sets}
    tensors = {}
    for block in space.structure.blocks if space.name == "disp" else ():
        for path, part in ((block.attention.path, "attention"), (block.mlp.path, "mlp")):
            read, written = SELECTIONS[part]
            tensors[f"{path}.residual_in"] = kept[names[block.index, read]]
            tensors[f"{path}.residual_out"] = kept[names[block.index, written]]
    return tensors


def _rest_dtype(lm: PreTrainedModel) -> torch.dtype:
    """What the model holds its unquantised weights in."""
    return lm.get_input_embeddings().weight.dtype


def _modules(module: nn.Module, path: str, adapters: bool) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds tensors, under the path it has without adapters; an adapter's is one with its base."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = _active_module(module, path) if adapters else module.original_module
    yield path, module if adapters else base_layer(module)
    if isinstance(module, BaseTunerLayer):
        return
    for name, child in module.named_children():
        yield from _modules(child, f"{path}.{name}" if path else name, adapters)


def _names(module: nn.Module) -> list[str]:
    """Of the tensors that a module itself has in the smaller model."""
    module = base_layer(module)
    if is_quantised(module):
        return ["weight"] if module.bias is None else ["weight", "bias"]
    return list(_own_tensors(module))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What `module` itself adds to a state dict; asking for `state_dict()` would make bitsandbytes repack weights."""
    buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
    own = {name: buffer for name, buffer in buffers.items() if name not in module._non_persistent_buffers_set}
    return own | dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _active_module(wrapper: AuxiliaryTrainingWrapper, path: str) -> nn.Module:
    """What a PEFT wrapper (`modules_to_save`, `trainable_token_indices`) computes with now."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    if isinstance(wrapper, ModulesToSaveWrapper):
        return wrapper.modules_to_save[wrapper.active_adapters[0]]
    if isinstance(wrapper, TrainableTokensWrapper):
        return wrapper.token_adapter
    raise UnsupportedModelError(f"{path}: a {type(wrapper).__name__} cannot be merged: remove it before exporting")


def require_mergeable(lm: nn.Module) -> None:
    """Refuse, before training, adapters that no export could merge.

    Raises:
        UnsupportedModelError: naming a layer, and what its adapter has.
    """
    for path, layer in lm.named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(base := layer.get_base_layer(), nn.Linear):
            continue
        active = active_adapters(layer)
        if base.bias is None and any(layer.lora_bias[name] for name in active):
            raise UnsupportedModelError(f"{path} has no bias that lora_bias could be merged into: leave lora_bias out")
        if is_quantised(base):
            _require_plain(layer, active, path)


def _require_plain(layer: Any, active: list[str], path: str) -> None:
    if any(name in layer.lora_variant or layer.lora_bias[name] for name in active):
        raise UnsupportedModelError(_ONLY_PLAIN.format(path))


@torch.no_grad()
def _merged_plain(layer: Any, path: str, rows: Tensor | None, cols: Tensor | None) -> dict[str, Tensor]:
    """What stays of a plain linear layer, W[rows][:, cols] + s B[rows] A[:, cols] over active adapters."""
    own = _sliced(_own_tensors(base_layer(layer)), rows, cols)
    adapters, dtype = active_adapters(layer), own["weight"].dtype
    if not adapters:
        return own
    merged = own.pop("weight").to(torch.float32, copy=rows is None and cols is None)
    try:
        for name in adapters:
            a, b = _cut(layer.lora_A[name].weight, None, cols), _cut(layer.lora_B[name].weight, rows, None)
            merged.addmm_(b.float(), a.float(), alpha=layer.scaling[name])
    except (IndexError, RuntimeError) as error:
        raise UnsupportedModelError(f"{path}: this adapter cannot be merged: {error}") from None
    return own | {"weight": merged.to(dtype)}


@torch.no_grad()
def _merged(layer: BaseTunerLayer, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Base tensors with the active adapters added, by PEFT's own `merge` on a float32 copy of the base."""
    base = layer.get_base_layer()
    if is_quantised(base):
        return _merged_quantised(layer, base, path, dtype)
    parameters = dict(base.named_parameters(recurse=False))
    originals = {name: parameter.data for name, parameter in parameters.items()}
    if layer.merged or layer.disable_adapters:
        return originals
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.to(torch.float32, copy=True)
        layer.merge()
        result = {name: p.data.to(originals[name].dtype, copy=True) for name, p in parameters.items()}
        layer.unmerge()  # for its bookkeeping: `merged_adapters` and cached norms
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: this adapter cannot be merged: {error}") from None
    finally:
        for name, parameter in parameters.items():
            parameter.data = originals[name]
    return result


def _merged_quantised(layer: BaseTunerLayer, base: nn.Linear, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    own = _dequantised(base, path, torch.float32)
    if layer.merged or layer.disable_adapters:
        return {name: tensor.to(dtype) for name, tensor in own.items()}
    if not isinstance(layer, LoraLayer):
        raise UnsupportedModelError(_ONLY_PLAIN.format(path))
    active = active_adapters(layer)
    _require_plain(layer, active, path)
    for name in active:
        own["weight"] = own["weight"] + layer.get_delta_weight(name).float()
    return {name: tensor.to(dtype) for name, tensor in own.items()}


def _dequantised(module: nn.Linear, path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    require_unpacked(module, path)
    own = {"weight": dequantised_weight(module).to(dtype)}
    return own if module.bias is None else own | {"bias": module.bias.detach().to(dtype)}
