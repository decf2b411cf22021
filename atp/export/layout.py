"""What the exported model is: a stock class where its own config can say the sizes, a ragged one otherwise.

The result is an empty model on the meta device, its config complete with an `atp` entry:
`{"format", "space", "sparsity", "widths": {kind: {"full", "least", "most"}}, "parameters": {"before", "after"}}`, and
`"blocks"` where it is ragged (see `modeling_atp`).

Of a model that was exported and pruned again, all of it is said from the stock model's sizes: `sparsity` is the share
of the original's prunable parameters that is gone, and `"runs": [{"space", "sparsity"}, ...]` says what each run took
of what it was given.

Ragged sizes are not written as transformers' own `per_layer_config`: its modelling half (transformers#45332) is missing
in 5.19 to 5.24, but for models written to it, none of them ours. What Llama does there: `intermediate_size` per layer
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

from atp.config import ALONE
from atp.errors import UnsupportedModelError
from atp.export import modeling_atp
from atp.export.compaction import SELECTIONS
from atp.export.remaining import Remaining, kept_counts
from atp.structure.discovery import Block, is_ragged, plain_config
from atp.structure.families import keep_blocks
from atp.structure.live import base_layer
from atp.structure.space import HIDDEN, KV, MLP, SWITCHES, VALUE, WHOLE_BLOCK, Space

FORMAT = 1
NOT_CARRIED = ("quantization_config", "auto_map", "architectures", "atp")
"""Config entries that describe the live model's storage or code, not the exported model."""


def empty_model(lm: PreTrainedModel, space: Space, masks: Mapping[str, Tensor]) -> PreTrainedModel:
    """The exported model without its weights, on the meta device.

    Raises:
        UnsupportedModelError: where the model needs a ragged class and its own is not one of transformers'.
    """
    source, earlier, stock_class = _source_config(lm), _earlier(lm), _stock_class(lm)
    with torch.device("meta"):
        stock = stock_class(stock_class.config_class.from_dict(source.to_dict()))
    added, left = _added_biases(lm, stock, space), Remaining(space, masks).blocks
    source, hidden_size = _shortened(source, left), _hidden_size(space, masks)
    if is_plain(space, masks) and not added and not is_ragged(lm.config):
        config, model_class, blocks = _plain_config(source, space, masks, hidden_size), type(lm), None
    else:
        model_class = _pruned_class(stock_class)
        own = {"hidden_size": hidden_size, "head_dim": space.structure.blocks[0].attention.head_dim}
        config = model_class.config_class.from_dict(source.to_dict() | (own if space.stream is not None else {}))
        blocks = _composed(earlier.get("blocks"), _blocks(space, masks, added), left)
    config.atp = _entry(space, masks, earlier) | ({"blocks": blocks} if blocks else {})
    with torch.device("meta"):
        model = model_class(config)
    before = earlier["parameters"]["before"] if earlier else stock.num_parameters()
    config.atp["parameters"] = {"before": before, "after": model.num_parameters()}
    return model


def _earlier(lm: PreTrainedModel) -> dict[str, Any]:
    """The entry of a model that was pruned before, else an empty one."""
    entry: Any = getattr(lm.config, "atp", None) or {}
    try:
        whole = not entry or (0.0 <= entry["sparsity"] < 1.0 <= entry["parameters"]["before"] and "space" in entry)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UnsupportedModelError(
            f"{type(lm).__name__}: the `atp` entry of its config does not say what was pruned: export it again, or "
            "remove the entry"
        )
    return entry


def _entry(space: Space, masks: Mapping[str, Tensor], earlier: dict[str, Any]) -> dict[str, Any]:
    """What was done, from the stock model's sizes.

    Args:
        earlier: the entry of the model that was pruned; empty where it had not been pruned before.
    """
    sparsity = round(space.sparsity(masks), 6)
    entry: dict[str, Any] = {"format": FORMAT, "space": space.name, "sparsity": sparsity}
    if earlier:
        runs = earlier.get("runs") or [{"space": earlier["space"], "sparsity": earlier["sparsity"]}]
        entry["sparsity"] = round(1.0 - (1.0 - earlier["sparsity"]) * (1.0 - sparsity), 6)
        entry["runs"] = [*runs, {"space": space.name, "sparsity": sparsity}]
    return entry | {"widths": dict(earlier.get("widths", {})) | _widths(space, masks, earlier.get("widths", {}))}


def _widths(space: Space, masks: Mapping[str, Tensor], earlier: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What there was and is of each kind of group, in the blocks that are left, and of blocks."""
    full, kept = kept_counts(space, masks)
    sizes = {kind: (max(full[kind]), min(kept[kind]), max(kept[kind])) for kind in kept}
    if space.stream is not None:
        sizes[HIDDEN] = (space.structure.hidden_size, *2 * (_hidden_size(space, masks),))
    if any(kind in SWITCHES for kind in space.kinds):
        sizes[WHOLE_BLOCK] = (len(space.structure.blocks), *2 * (len(Remaining(space, masks).blocks),))
    return {
        kind: {"full": earlier[kind]["full"] if kind in earlier else size, "least": least, "most": most}
        for kind, (size, least, most) in sizes.items()
    }


def _composed(earlier: dict[str, Any] | None, later: dict[str, Any], left: list[int]) -> dict[str, Any]:
    """The table from stock sizes, of what `later` made of blocks that had been cut as `earlier` says.

    Args:
        left: which of those blocks are left.
    """
    if earlier is None:
        return later
    full, kept = ({kind: [c[i] for i in left] for kind, c in earlier[name].items()} for name in ("full", "kept"))
    if VALUE in later["full"] and KV in full:  # values were counted in the heads that were left
        counts = zip(later["full"][VALUE], kept[KV], full[KV], strict=True)
        full[VALUE] = [values // heads * of for values, heads, of in counts]
    paths = earlier["linears"] | later["linears"]
    linears = {path: earlier["linears"].get(path, {}) | later["linears"].get(path, {}) for path in paths}
    composed = {name: earlier[name] | later[name] for name in ("norms", "selections")}
    return later | composed | {"full": later["full"] | full, "kept": kept | later["kept"], "linears": linears}


def is_plain(space: Space, masks: Mapping[str, Tensor]) -> bool:
    """Whether the family's own config can say the sizes that `masks` leaves."""
    if space.name in ALONE or Remaining(space, masks).off:
        return False
    _, kept = kept_counts(space, masks)
    same = all(len(set(counts)) == 1 for counts in kept.values())
    return same and (KV not in kept or kept[KV][0] in space.structure.plain_kv_heads)


def _plain_config(
    source: PreTrainedConfig, space: Space, masks: Mapping[str, Tensor], hidden_size: int
) -> PreTrainedConfig:
    _, kept = kept_counts(space, masks)
    block = space.structure.blocks[0]
    kv_heads = kept[KV][0] if KV in kept else block.attention.num_kv_heads
    channels = kept[MLP][0] if MLP in kept else block.mlp.intermediate_size
    return plain_config(source, block.attention, kv_heads, channels, hidden_size)


def _hidden_size(space: Space, masks: Mapping[str, Tensor]) -> int:
    return int(masks[HIDDEN].sum()) if space.stream is not None else space.structure.hidden_size


def _shortened(config: PreTrainedConfig, blocks: list[int]) -> PreTrainedConfig:
    """`config` with these blocks left."""
    if len(blocks) == config.num_hidden_layers:
        return config
    config = copy.deepcopy(config)
    keep_blocks(config, blocks)
    return config


def _added_biases(lm: PreTrainedModel, stock: PreTrainedModel, space: Space) -> set[str]:
    """Paths of linear layers that have a bias where the family has none: it compensates for what was pruned."""
    return {
        linear.path
        for linear in space.linears
        if base_layer(lm.get_submodule(linear.path)).bias is not None and stock.get_submodule(linear.path).bias is None
    }


def _stock_class(lm: PreTrainedModel) -> type[PreTrainedModel]:
    """The family's own class, which a ragged one is a subclass of."""
    return type(lm).__base__ if is_ragged(lm.config) else type(lm)  # type: ignore[return-value]


def _source_config(lm: PreTrainedModel) -> PreTrainedConfig:
    config = copy.deepcopy(lm.config)
    for name in NOT_CARRIED:
        config.__dict__.pop(name, None)
    if hasattr(config, "use_cache"):
        config.use_cache = True  # the Trainer switches it off in the live model's
    return config


def _pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    try:
        return getattr(modeling_atp, f"{modeling_atp.PREFIX}{stock.__name__}")
    except AttributeError:
        raise UnsupportedModelError(
            f"{stock.__name__} is not a class of transformers, so blocks of unequal size cannot be exported: "
            "use space='width' with uniform=True"
        ) from None


def _blocks(space: Space, masks: Mapping[str, Tensor], biases: set[str]) -> dict[str, Any]:
    """The table that `modeling_atp` builds from; every block must have the same modules.

    A layer with an added bias in one block has it in all: blocks that need none keep zeros.
    """
    first, (full, kept) = space.structure.blocks[0], kept_counts(space, masks)
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
        **parts,
        "full": full,
        "kept": kept,
        "linears": linears,
        "biases": biased,
        "norms": norms,
        "selections": {parts[part]: list(SELECTIONS[part]) for part in parts} if space.name == "disp" else {},
    }


def _linear_owners(space: Space, block: Block) -> dict[str, dict[str, str]]:
    kinds = {s.name: s.kind for s in space.sets if s.block is not None}
    owners: dict[str, dict[str, str]] = {}
    for linear in space.linears:
        if _is_in(block, linear.path):
            sides = {"rows": linear.rows, "cols": linear.cols}
            found = {side: kinds[axis.set] for side, axis in sides.items() if axis and axis.set in kinds}
            owners |= {_inside(block, linear.path): found} if found else {}
    return owners


def _is_in(block: Block, path: str) -> bool:
    return path.startswith(f"{block.path}.")


def _inside(block: Block, path: str) -> str:
    return path.removeprefix(f"{block.path}.")
