"""The LoRA of a pruned model as a PEFT adapter of its own, on the pruned base: one base carries many adapters.

`OUT/base/` is an ordinary exported folder whose weights are those under the adapter, refitted where the run refitted
them; `OUT/adapter/` is what `PeftModel.from_pretrained(base, "OUT/adapter")` reads. Rows and columns that are gone are
gone from LoRA's B and A too; where a norm spans all heads (see `compaction`), B is scaled as its base weight is. DoRA
divides by the length of a row of W + sBA, which is shorter with fewer columns: its magnitude shrinks alike.

Not covered, and refused by name: adapters other than LoRA, several at once, and what changes the base itself
(`bias`, `layer_replication`, `target_parameters`).
"""

import copy
import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from atp.errors import UnsupportedModelError
from atp.export.card import About, write_adapter_card, write_card
from atp.export.compaction import CompactTensors
from atp.export.folder import attached_decision, free_place, write_model
from atp.files import written_by_one
from atp.structure.live import effective_weight
from atp.structure.sharding import gathered, settle, whole
from atp.weights import write_weights

_PREFIX = "base_model.model."
_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")
_CHANGE_THE_BASE = {"bias": "none", "layer_replication": None, "target_parameters": None}
"""Settings of `LoraConfig` that make more of the base than an adapter on it, and their harmless values."""


def export_adapter(
    model: nn.Module,
    out: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    overwrite: bool = False,
    writes: bool = True,
    about: About | None = None,
) -> Path:
    """Save the pruned base and, beside it, the active LoRA adapter of `model`; `model` itself does not change.

    The adapter names its base by the absolute path of `out/base`: PEFT takes `base_model_name_or_path` as it stands,
    so that a relative one would be looked for in whatever folder a process is started.

    Args:
        model: a `PeftModel` with masks attached and one LoRA adapter active, DoRA included.
        masks, processing_class, overwrite, writes, about: as `export` takes them.

    Returns:
        The folder that holds `base` and `adapter`.

    Raises:
        UnsupportedModelError: naming what of the adapter cannot be carried over.
        ATPError, CheckpointError: as `export` does.
    """
    name, config = _only_adapter(model)
    attachment, decision = attached_decision(model, masks)
    out = free_place(out, overwrite or not writes)
    settle(attachment.lm)
    lm, space = attachment.lm, attachment.space
    about = about or About(base=lm.name_or_path)
    with written_by_one(out, writes) as folder:
        base, adapter = (None, None) if folder is None else (folder / "base", folder / "adapter")
        for part in (base, adapter):
            if part is not None:
                part.mkdir()
        write_model(lm, space, decision, base, processing_class, adapters=False)
        compact = CompactTensors(lm, space, decision, adapters=False)
        tensors = _adapter_tensors(model, name, compact)
        plan = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
        write_weights(adapter, plan, tensors.__getitem__, sys.maxsize, "adapter_model")
        if base is not None and adapter is not None:
            changed = _on_what_is_left(_adapter_config(config, out / "base"), lm, name, compact)
            changed.save_pretrained(str(adapter))
            write_card(base, dataclasses.replace(about, results=()), is_base=True)
            write_adapter_card(adapter, base, about)
    return out


def _only_adapter(model: Any) -> tuple[str, LoraConfig]:
    """The adapter to be exported: its name and settings."""
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(f"{type(model).__name__} has no adapter: export it in the format hf")
    if len(model.active_adapters) != 1:
        raise UnsupportedModelError(
            f"{len(model.active_adapters)} adapters are active ({', '.join(model.active_adapters)}): choose one with "
            "model.set_adapter(name)"
        )
    name = model.active_adapters[0]
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise UnsupportedModelError(f"adapter {name!r} is a {type(config).__name__}, not LoRA: export the format hf")
    for setting, harmless in _CHANGE_THE_BASE.items():
        if (value := getattr(config, setting)) not in (harmless, [], None):
            raise UnsupportedModelError(
                f"LoRA's {setting}={value!r} changes more than an adapter can carry: export it in the format hf"
            )
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            _refuse_unusual(path, layer, name)
    return name, config


def _refuse_unusual(path: str, layer: Any, name: str) -> None:
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
    if variant is not None and variant not in _VARIANTS:
        raise UnsupportedModelError(f"{path}: a {variant} cannot be cut to the pruned size: export the format hf")
    if layer.merged:
        raise UnsupportedModelError(f"{path}: the adapter is merged: call model.unmerge_adapter() first")
    if layer.disable_adapters:
        raise UnsupportedModelError(f"{path}: adapters are disabled: enable them, or export the format hf")


def _adapter_tensors(model: Any, name: str, compact: CompactTensors) -> dict[str, Tensor]:
    """What PEFT would save, cut to the pruned size, by PEFT's names. Collective where parameters are sharded."""
    live = dict(model.named_parameters(remove_duplicate=False))
    saved = get_peft_model_state_dict(model, live, adapter_name=name, save_embedding_layers=False)
    tensors = {}
    for key, tensor in saved.items():
        if (new := compact.new_name(key.removeprefix(_PREFIX))) is not None:
            tensors[f"{_PREFIX}{new}"] = _cut(key, whole(tensor).cpu(), model, compact)
    return tensors


@torch.no_grad()
def _cut(key: str, tensor: Tensor, model: Any, compact: CompactTensors) -> Tensor:
    path, _, part = key.removeprefix(_PREFIX).partition(".lora_")
    if compact.is_cut(path.removesuffix(".weight").partition(".token_adapter")[0]):
        raise UnsupportedModelError(
            f"{path}: what an adapter holds of the embedding, the head or a norm cannot be cut with the residual "
            "stream: export it in the format hf"
        )
    sides = compact.sides(path if part else path.rpartition(".")[0])
    if not part and not (sides.rows is None and sides.cols is None):
        raise UnsupportedModelError(
            f"{path}: what an adapter holds whole of a pruned layer (modules_to_save) is not cut: export it in the "
            "format hf"
        )
    if part == "A.weight":
        return tensor if sides.cols is None else tensor[:, sides.cols]
    if part == "magnitude_vector" and sides.cols is not None:
        tensor = tensor * _shortened(model.get_submodule(f"{_PREFIX}{path}"), sides.cols).to(tensor)
    if part in ("B.weight", "B.bias", "magnitude_vector"):
        tensor = tensor if sides.rows is None else tensor[sides.rows]
        scale = sides.rest if part == "B.bias" else sides.weight
        return tensor if scale == 1.0 else (tensor.float() * scale).to(tensor.dtype)
    return tensor


def _shortened(layer: nn.Module, cols: Tensor) -> Tensor:
    """For every row of W + sBA the share of its length that is left with `cols` only, `(out_features,)`."""
    with gathered(layer):
        weight = effective_weight(layer).cpu()
    return weight[:, cols].norm(dim=1) / weight.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def _adapter_config(config: LoraConfig, base: Path) -> LoraConfig:
    """As the adapter's own, on the pruned base; how it was drawn at first says nothing of it any more."""
    changed = copy.deepcopy(config)
    changed.base_model_name_or_path, changed.revision = str(base), None
    changed.init_lora_weights, changed.inference_mode = True, True
    changed.loftq_config, changed.eva_config, changed.corda_config, changed.lora_ga_config = {}, None, None, None
    return changed


def _on_what_is_left(config: LoraConfig, lm: nn.Module, name: str, compact: CompactTensors) -> LoraConfig:
    """`config` as it is where every layer under LoRA keeps its path; else layer by layer, by their new paths."""
    layers = {p: m for p, m in lm.named_modules() if isinstance(m, LoraLayer) and name in m.r}
    paths = {path: (compact.new_name(f"{path}.") or "").removesuffix(".") for path in layers}
    if all(old == new for old, new in paths.items()):
        return config
    left = {new: layers[old] for old, new in paths.items() if new}
    config.target_modules = set(left)
    config.rank_pattern = {f"^{re.escape(new)}$": layer.r[name] for new, layer in left.items()}
    config.alpha_pattern = {f"^{re.escape(new)}$": layer.lora_alpha[name] for new, layer in left.items()}
    config.layers_to_transform, config.layers_pattern, config.exclude_modules = None, None, None
    return config
