"""What the exported model is: a stock class where its own config can say the sizes, a ragged one otherwise.

The result is an empty model on the meta device, its config complete with an `atp` entry:
`{"format", "space", "sparsity", "parameters": {"before", "after"}}`, and `"blocks"` where it is ragged (see
`modeling_atp`).

Ragged sizes are not written as transformers' own `per_layer_config`: its modelling half (transformers#45332) is missing
in 5.19 and 5.23, but for models written to it, none of them ours. What Llama does there: `intermediate_size` per layer
means what it would mean here, and is kept and saved; but then every read of `config.intermediate_size` raises, in our
class and in other tools as in the stock class. The way out, `allow_global_per_layer_attribute_access`, is saved along,
and with it the stock class builds full-size blocks. Head counts are refused when the config is made. `skip` is accepted
and ignored without a word. `tests/consumers/test_per_layer_config.py` notices when that changes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from atp.errors import UnsupportedModelError
from atp.export import modeling_atp
from atp.export.compaction import SELECTIONS
from atp.structure.discovery import Block, plain_config
from atp.structure.live import base_layer
from atp.structure.space import KV, MLP, Space

FORMAT = 1
NOT_CARRIED = ("quantization_config", "auto_map", "architectures")
"""Config entries that describe the live model's storage or code, not the exported model."""


def empty_model(lm: PreTrainedModel, space: Space, masks: Mapping[str, Tensor]) -> PreTrainedModel:
    """The exported model without its weights, on the meta device.

    Raises:
        UnsupportedModelError: where the model needs a ragged class and its own is not one of transformers'.
    """
    source = _source_config(lm)
    kept = _kept_counts(space, masks)
    with torch.device("meta"):
        stock = type(lm)(source)
    if is_plain(space, masks) and not _added_biases(lm, stock, space):
        attention = space.structure.blocks[0].attention
        config, model_class = plain_config(source, attention, kept[KV][0], kept[MLP][0]), type(lm)
        blocks = None
    else:
        model_class = _pruned_class(type(lm))
        config = model_class.config_class.from_dict(source.to_dict())
        blocks = _blocks(space, kept, _added_biases(lm, stock, space))
    entry = {"format": FORMAT, "space": space.name, "sparsity": round(space.sparsity(masks), 6)}
    config.atp = entry | ({"blocks": blocks} if blocks else {})
    with torch.device("meta"):
        model = model_class(config)
    config.atp["parameters"] = {"before": stock.num_parameters(), "after": model.num_parameters()}
    return model


def is_plain(space: Space, masks: Mapping[str, Tensor]) -> bool:
    """Whether the family's own config can say the sizes that `masks` leaves."""
    if space.name != "width":
        return False
    kept = _kept_counts(space, masks)
    same = all(len(set(counts)) == 1 for counts in kept.values())
    return same and kept[KV][0] in space.structure.plain_kv_heads


def _added_biases(lm: PreTrainedModel, stock: PreTrainedModel, space: Space) -> set[str]:
    """Paths of linear layers that have a bias where the family has none: it compensates for what was pruned."""
    return {
        linear.path
        for linear in space.linears
        if base_layer(lm.get_submodule(linear.path)).bias is not None and stock.get_submodule(linear.path).bias is None
    }


def _source_config(lm: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(lm.config)
    for name in NOT_CARRIED:
        config.__dict__.pop(name, None)
    return config


def _kept_counts(space: Space, masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Per kind, the kept groups of every block in order."""
    return {kind: [int(masks[s.name].sum()) for s in space.sets if s.kind == kind] for kind in space.kinds}


def _pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    try:
        return getattr(modeling_atp, f"{modeling_atp.PREFIX}{stock.__name__}")
    except AttributeError:
        raise UnsupportedModelError(
            f"{stock.__name__} is not a class of transformers, so blocks of unequal size cannot be exported: "
            "use space='width' with uniform=True"
        ) from None


def _blocks(space: Space, kept: dict[str, list[int]], biases: set[str]) -> dict[str, Any]:
    """The table that `modeling_atp` builds from; every block must have the same modules.

    A layer with an added bias in one block has it in all: blocks that need none keep zeros.
    """
    first = space.structure.blocks[0]
    linears = _linear_owners(space, first)
    biased = sorted(
        {_inside(block, path) for block in space.structure.blocks for path in biases if _is_in(block, path)}
    )
    for block in space.structure.blocks:
        if _linear_owners(space, block) != linears:
            raise UnsupportedModelError(f"{block.path}: its linear layers differ from those of {first.path}")
    norms = {n.path.removeprefix(f"{first.path}."): KV for n in space.norms if n.path.startswith(f"{first.path}.")}
    parts = {"attention": _inside(first, first.attention.path), "mlp": _inside(first, first.mlp.path)}
    return {
        "container": first.path.rsplit(".", 1)[0],
        "attention": parts["attention"],
        "full": {kind: [s.size for s in space.sets if s.kind == kind] for kind in space.kinds},
        "kept": kept,
        "linears": linears,
        "biases": biased,
        "norms": norms,
        "selections": {parts[part]: list(SELECTIONS[part]) for part in parts} if space.name == "disp" else {},
    }


def _linear_owners(space: Space, block: Block) -> dict[str, dict[str, str]]:
    kinds = {s.name: s.kind for s in space.sets}
    owners = {}
    for linear in space.linears:
        if _is_in(block, linear.path):
            sides = {"rows": linear.rows, "cols": linear.cols}
            owners[_inside(block, linear.path)] = {side: kinds[axis.set] for side, axis in sides.items() if axis}
    return owners


def _is_in(block: Block, path: str) -> bool:
    return path.startswith(f"{block.path}.")


def _inside(block: Block, path: str) -> str:
    return path.removeprefix(f"{block.path}.")
