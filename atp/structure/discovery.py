"""Discovery: a live Hugging Face model -> its blocks, readers, writers and head geometry, as frozen data.

Readers (linear layers that read the residual stream) and writers come from `config.base_model_tp_plan`; names are
resolved by `families.py`; everything is verified against the shapes of the live modules. Nothing is guessed: a module
that does not fit raises `UnsupportedModelError` with its name.

Not covered: mixture-of-experts, latent attention, encoder-decoder models, GPT-2's Conv1D.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from atp.errors import UnsupportedModelError
from atp.structure.families import (
    DERIVED_HEAD_SIZE,
    IGNORED_STYLES,
    PLANS,
    READER_STYLES,
    READERS,
    WRITER_STYLES,
    WRITERS,
    Role,
)
from atp.structure.live import base_layer, causal_lm
from atp.structure.sharding import shape_of
from atp.structure.stream import Stream, find_stream

_EACH = ".*."
"""In a plan's patterns, which of the blocks: any."""


@dataclass(frozen=True)
class Linear:
    """One linear layer. `path` is its module path inside the causal LM."""

    path: str
    in_features: int
    out_features: int
    packs: tuple[str, ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm inside attention that spans all heads of `source` (`"q"` or `"k"`), as in OLMo 2."""

    path: str
    source: str


@dataclass(frozen=True)
class Attention:
    """Attention of one block: `num_kv_heads` KV groups of `num_heads // num_kv_heads` query heads each.

    `norms_values`: whether a norm reads what the values' projection gives.
    """

    path: str
    readers: tuple[Linear, ...]
    writer: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    spanning_norms: tuple[Norm, ...] = ()
    norms_values: bool = False

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def value_reader(self) -> Linear | None:
        """The layer whose outputs are the values, all of them and nothing else; None where they are packed."""
        return next((reader for reader in self.readers if reader.packs == ("v",)), None)


@dataclass(frozen=True)
class MLP:
    """MLP of one block: gate and up (or up alone, or both packed in one reader), then the writer."""

    path: str
    readers: tuple[Linear, ...]
    writer: Linear
    intermediate_size: int


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    index: int
    path: str
    attention: Attention
    mlp: MLP

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All seven (or fewer, where packed) linear layers, readers before their writer."""
        return (*self.attention.readers, self.attention.writer, *self.mlp.readers, self.mlp.writer)


@dataclass(frozen=True)
class Structure:
    """What discovery found. `plain_kv_heads`: the KV-head counts that this family's own config can express."""

    model_type: str
    hidden_size: int
    blocks: tuple[Block, ...]
    plain_kv_heads: tuple[int, ...]
    stream: Stream

    @property
    def prunable_parameters(self) -> int:
        """Weights of all decoder linears (biases, norms, embeddings and head are not counted)."""
        return sum(linear.in_features * linear.out_features for block in self.blocks for linear in block.linears)


def discover(model: nn.Module) -> Structure:
    """Find the blocks of a causal LM (bare, quantised, or inside a `PeftModel`).

    Raises:
        UnsupportedModelError: naming the module that does not fit and why.
    """
    lm = causal_lm(model)
    config = lm.config
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"{type(lm).__name__} reads more than text: prune its text part, atp.text_model(model), LoRA put on that"
        )
    _refuse_pruned_otherwise(lm)
    stack = lm.base_model
    if lm.get_output_embeddings() is None:
        what = "is a bare decoder" if stack is lm else "is no causal LM"
        raise UnsupportedModelError(f"{type(lm).__name__} {what}: load it with AutoModelForCausalLM")
    if stack is lm:
        raise UnsupportedModelError(f"{type(lm).__name__} hides its decoder: not supported")
    plan = _plan(lm, stack)
    container = _container(plan)
    prefix = f"{lm.base_model_prefix}."
    layers = stack.get_submodule(container)
    if len(layers) == 0:
        raise UnsupportedModelError(f"{prefix}{container} has no blocks: there is nothing to prune")
    blocks = tuple(
        _block(lm, index, f"{prefix}{container}.{index}", plan, container, config.hidden_size)
        for index in range(len(layers))
    )
    return Structure(
        model_type=_family(config),
        hidden_size=config.hidden_size,
        blocks=blocks,
        plain_kv_heads=() if is_ragged(config) else _plain_kv_heads(config, blocks),
        stream=find_stream(lm, [(b.path, b.attention.path, b.mlp.path) for b in blocks], _hidden_step(config, blocks)),
    )


def is_ragged(config: PretrainedConfig) -> bool:
    """Whether the model was exported by atp with blocks of sizes of their own, in a subclass of its family's class."""
    return bool((getattr(config, "atp", None) or {}).get("blocks"))


def _family(config: PretrainedConfig) -> str:
    """The family's model type; a subclass for uneven blocks has one of its own."""
    return type(config).__base__.model_type if is_ragged(config) else config.model_type  # type: ignore[union-attr]


def _refuse_pruned_otherwise(lm: PreTrainedModel) -> None:
    """What was exported by atp can be pruned further where its blocks are whole layers of smaller sizes."""
    entry = getattr(lm.config, "atp", None) or {}
    if is_ragged(lm.config) and (entry.get("space") != "width" or entry["blocks"]["selections"]):
        raise UnsupportedModelError(
            f"{type(lm).__name__} was pruned in space {entry.get('space')!r}, which cannot be pruned again: start from "
            "its base model and ask for the sparsity of both runs together; 'width' may be pruned in several runs"
        )


def plain_config(
    config: PretrainedConfig, attention: Attention, kv_heads: int, channels: int, hidden_size: int | None = None
) -> PretrainedConfig:
    """`config` with `kv_heads` KV heads and `channels` MLP channels in every block, in the family's own fields.

    Args:
        hidden_size: of the residual stream; None leaves it.

    Raises:
        ValueError: where the family's own validation refuses these sizes.
    """
    values = config.to_dict() | {
        "num_attention_heads": kv_heads * attention.queries_per_group,
        "num_key_value_heads": kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": channels,
        "hidden_size": config.hidden_size if hidden_size is None else hidden_size,
    }
    # Gemma 3 halves the sliding window of bidirectional models on every construction; `to_dict` undoes it.
    return type(config).from_dict(values)


def _plan(lm: PreTrainedModel, stack: Any) -> dict[str, str]:
    """Layer pattern -> style, from the config, else from our table."""
    config: PretrainedConfig = stack.config
    plan = getattr(config, "base_model_tp_plan", None) or PLANS.get(_family(config))
    if plan and any(_EACH in pattern for pattern in plan):
        return plan
    for name, module in stack.named_modules():
        if type(module).__name__ == "Conv1D":
            raise UnsupportedModelError(
                f"{lm.base_model_prefix}.{name} is a Conv1D (weights stored transposed): model type "
                f"{config.model_type!r} is not supported; convert it to nn.Linear projections first"
            )
    raise UnsupportedModelError(
        f"model type {config.model_type!r} has no base_model_tp_plan of its blocks in its config and no entry in "
        "atp/structure/families.py: add one there to support it"
    )


def _container(plan: dict[str, str]) -> str:
    return next(pattern.split(_EACH)[0] for pattern in plan if _EACH in pattern)


def _block(lm: PreTrainedModel, index: int, path: str, plan: dict[str, str], container: str, hidden_size: int) -> Block:
    layer = lm.get_submodule(path)
    readers: dict[str, list[Linear]] = {"attention": [], "mlp": []}
    writers: dict[str, Linear] = {}
    planned = set()
    for pattern, style in plan.items():
        name = pattern.removeprefix(f"{container}.*.")
        full = f"{path}.{name}"
        if style in IGNORED_STYLES or not pattern.startswith(f"{container}.*."):
            continue
        module = _submodule(layer, name)
        if style in READER_STYLES and module is not None:
            role = READERS.get(name.rsplit(".", 1)[-1])
            if role is None:
                raise UnsupportedModelError(f"{full}: reader of unknown role; add it to atp/structure/families.py")
            readers[role.part].append(_linear(module, full, role))
        elif style in WRITER_STYLES and module is not None:
            part = WRITERS.get(name)
            if part is None:
                raise UnsupportedModelError(f"{full}: writer of unknown role; add it to atp/structure/families.py")
            writers[part] = _linear(module, full)
        elif module is not None or _has_experts(layer, name):
            raise UnsupportedModelError(f"{full}: style {style!r} (mixture-of-experts or fused) is not supported")
        planned.add(name)
    _refuse_unplanned(layer, path, planned)
    for part in ("attention", "mlp"):
        if not readers[part] or part not in writers:
            raise UnsupportedModelError(f"{path}: no {part} readers and writer found in the plan")
    return Block(
        index=index,
        path=path,
        attention=_attention(lm, readers["attention"], writers["attention"], hidden_size),
        mlp=_mlp(readers["mlp"], writers["mlp"], hidden_size),
    )


def _has_experts(layer: nn.Module, name: str) -> bool:
    """Whether what a plan calls `name` lies in experts that are there: plans of dense models may name them too."""
    before, experts, _ = name.partition("experts")
    return bool(experts) and _submodule(layer, before + experts) is not None


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _linear(module: nn.Module, path: str, role: Role | None = None) -> Linear:
    base: Any = base_layer(module)
    sizes = (getattr(base, "in_features", None), getattr(base, "out_features", None))
    if not isinstance(base, nn.Linear) and not all(isinstance(size, int) for size in sizes):
        raise UnsupportedModelError(f"{path} is a {type(base).__name__}, not a linear layer: not supported")
    packs, interleaved = (role.packs, role.interleaved) if role else ((), False)
    return Linear(path, base.in_features, base.out_features, packs, interleaved)


def _refuse_unplanned(layer: nn.Module, path: str, planned: set[str]) -> None:
    """Every module with a matrix of its own must be in the plan: an unknown one would silently stay dense."""
    for name, module in layer.named_modules():
        inside = any(name == known or name.startswith(f"{known}.") for known in planned)
        if inside or not any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            continue
        raise UnsupportedModelError(
            f"{path}.{name} ({type(module).__name__}) holds a weight matrix outside the known plan "
            "(a router, expert, or extra projection): not supported"
        )


def _attention(lm: PreTrainedModel, readers: list[Linear], writer: Linear, hidden_size: int) -> Attention:
    path = writer.path.rsplit(".", 1)[0]
    module = lm.get_submodule(path)
    packed = [part for reader in readers for part in reader.packs]
    if sorted(packed) != ["k", "q", "v"]:
        raise UnsupportedModelError(f"{path}: expected queries, keys and values, found {packed}")
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if not isinstance(head_dim, int) or writer.in_features % head_dim:
        raise UnsupportedModelError(f"{path}: head size {head_dim!r} does not divide {writer.in_features}")
    num_heads = writer.in_features // head_dim
    total = sum(reader.out_features for reader in readers)
    num_kv_heads = (total - writer.in_features) // (2 * head_dim)
    expected = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
    for reader in readers:
        if reader.out_features != sum(expected[part] for part in reader.packs) or reader.in_features != hidden_size:
            raise UnsupportedModelError(
                f"{reader.path}: shape ({reader.out_features}, {reader.in_features}) does not fit {num_heads} query "
                f"and {num_kv_heads} key/value heads of size {head_dim}"
            )
        if reader.interleaved and num_heads != num_kv_heads:
            raise UnsupportedModelError(f"{reader.path}: interleaved rows with grouped queries are not supported")
    if num_kv_heads < 1 or num_heads % num_kv_heads or writer.out_features != hidden_size:
        raise UnsupportedModelError(f"{writer.path}: {num_heads} heads over {num_kv_heads} key/value heads do not fit")
    norms = _spanning_norms(module, path, {reader.path for reader in readers} | {writer.path}, head_dim, expected)
    norms_values = any(name.rpartition(".")[2] == "v_norm" for name, _ in module.named_modules())
    return Attention(path, tuple(readers), writer, num_heads, num_kv_heads, head_dim, norms, norms_values)


def _spanning_norms(
    module: nn.Module, path: str, linears: set[str], head_dim: int, expected: dict[str, int]
) -> tuple[Norm, ...]:
    """Norms inside attention: per-head ones need nothing, ones over all heads are sliced, others are refused."""
    found = []
    for name, child in module.named_modules():
        full = f"{path}.{name}"
        parameters = dict(child.named_parameters(recurse=False))
        if not parameters or any(full == linear or full.startswith(f"{linear}.") for linear in linears):
            continue
        source = {"q_norm": "q", "k_norm": "k"}.get(name)
        rms = set(parameters) == {"weight"} and "RMSNorm" in type(child).__name__
        if rms and shape_of(child.weight) == (head_dim,):
            continue
        if rms and source and shape_of(child.weight) == (expected[source],):
            found.append(Norm(full, source))
            continue
        raise UnsupportedModelError(f"{full} ({type(child).__name__}) is a norm of unknown shape: not supported")
    return tuple(found)


def _mlp(readers: list[Linear], writer: Linear, hidden_size: int) -> MLP:
    path = writer.path.rsplit(".", 1)[0]
    size = writer.in_features
    for reader in readers:
        if reader.out_features != size * len(reader.packs) or reader.in_features != hidden_size:
            raise UnsupportedModelError(
                f"{reader.path}: shape ({reader.out_features}, {reader.in_features}) does not fit {size} channels"
            )
    if writer.out_features != hidden_size:
        raise UnsupportedModelError(f"{writer.path}: writes {writer.out_features} dimensions, not {hidden_size}")
    return MLP(path, tuple(readers), writer, size)


def _hidden_step(config: PretrainedConfig, blocks: tuple[Block, ...]) -> int:
    """What the width of the residual stream may be a multiple of, by asking the family's own config; 0: of itself."""
    if config.model_type in DERIVED_HEAD_SIZE:
        return 0
    values = config.to_dict() | {"head_dim": blocks[0].attention.head_dim}
    family: Any = type(config).__base__ if is_ragged(config) else type(config)
    for step in (1, config.num_attention_heads):
        try:
            family.from_dict(values | {"hidden_size": config.hidden_size - step})
        except Exception:  # whatever the family's validation raises, this size is refused
            continue
        return step
    return 0


def _plain_kv_heads(config: PretrainedConfig, blocks: tuple[Block, ...]) -> tuple[int, ...]:
    """KV-head counts with which the family's own config builds the very same head size, by asking it."""
    shapes = {(b.attention.num_kv_heads, b.attention.num_heads, b.attention.head_dim) for b in blocks}
    widths = {b.mlp.intermediate_size for b in blocks}
    full = blocks[0].attention.num_kv_heads
    if len(shapes) > 1 or len(widths) > 1:
        return ()
    if config.model_type in DERIVED_HEAD_SIZE:
        return (full,)
    counts = []
    for kv_heads in range(1, full + 1):
        try:
            plain_config(config, blocks[0].attention, kv_heads, min(widths))
        except Exception:  # whatever the family's validation raises, these sizes are refused
            continue
        counts.append(kv_heads)
    return tuple(counts)
