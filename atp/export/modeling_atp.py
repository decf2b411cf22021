"""Causal LMs whose blocks have sizes of their own: stock transformers models, resized as `config.atp["blocks"]` says.

Self-contained on purpose: it imports torch and transformers only. `atp` copies this very file into each exported
folder that no stock class can hold; `trust_remote_code=True` finds it there. Where `atp` is imported no flag is needed.

`PrunedLlamaForCausalLM` and `PrunedLlamaConfig`, and likewise for every family, are subclasses of transformers'
`LlamaForCausalLM` and `LlamaConfig`. They are made when first asked for, by this module's `__getattr__`.

`config.atp["blocks"]` holds:
    container: path of the list of blocks.        attention, mlp: paths of these inside a block.
    full, kept: per kind of group, how many each block had and has: {"kv": [3, 3], "mlp": [96, 96]}. Where none of "kv"
        is left the block has no attention, where none of "mlp" is, no MLP.
    linears: per linear layer, which kind owns its rows (outputs) and its columns (inputs).
    biases: linear layers that have a bias although the family's have none.
    norms: per norm over all heads, the kind that owns its features.
    selections: per attention or MLP, the kinds of residual dimensions it reads and writes. It then sees only the
        dimensions in its buffer `residual_in`, and adds to those in `residual_out`; the others get zeros.

Where "value" is among the kinds, attention's values have lost dimensions. To attention and its cache these are zeros:
what the values' layer gives goes to the rows `value_rows`, and the writer is given the columns `value_columns`.

Where there are a GPU and Triton, and no gradients, blocks like Llama's read and write their dimensions in one kernel
with the RMSNorm and the residual add that are there anyway. `torch.compile` makes kernels of its own.
"""

import functools
import inspect
import os
import warnings
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MODEL_TYPE = "atp"
PREFIX = "Pruned"


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(transformers, name.removeprefix(PREFIX))
    if not (isinstance(stock, type) and issubclass(stock, (PreTrainedConfig, PreTrainedModel))):
        raise AttributeError(f"{name.removeprefix(PREFIX)} is no model or config of transformers")
    globals()[name] = _config_class(stock) if issubclass(stock, PreTrainedConfig) else _model_class(stock)
    return globals()[name]


def _config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    body = {"model_type": MODEL_TYPE, "_auto_class": "AutoConfig", "__module__": __name__}
    return type(f"{PREFIX}{stock.__name__}", (stock,), body)


def _model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    name = f"{PREFIX}{stock.config_class.__name__}"
    config_class = globals()[name] if name in globals() else __getattr__(name)

    def init(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        entry = getattr(config, "atp", None)
        resize(self, entry.get("blocks") if isinstance(entry, dict) else None)

    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = stock.from_pretrained.__func__(cls, *args, **kwargs)
        _check_indices(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    body = {
        "__init__": init,
        "from_pretrained": classmethod(from_pretrained),
        "_get_name": lambda _: stock.__name__,  # by which the Trainer knows whether label smoothing shifts labels
        "_get_static_cache_init_shape": lambda _: None,  # as layers first run: one head count is not all layers'
        "__module__": __name__,
        "_auto_class": "AutoModelForCausalLM",
        "config_class": config_class,
    }
    return type(f"{PREFIX}{stock.__name__}", (stock,), body)


def resize(model: PreTrainedModel, layout: Any) -> None:
    """Give every block of a stock `model` its own sizes, in place; module names stay those of the family."""
    _check_layout(model, layout)
    for index, block in enumerate(model.get_submodule(layout["container"])):
        kept = {kind: counts[index] for kind, counts in layout["kept"].items()}
        full = {kind: counts[index] for kind, counts in layout["full"].items()}
        gone = [layout[part] for part, kind in (("attention", "kv"), ("mlp", "mlp")) if kept.get(kind) == 0]
        for path in gone:
            _leave_out(block, path, index if path == layout["attention"] else None)

        def size(features: int, kind: str | None, kept: dict = kept, full: dict = full) -> int:
            return features if kind is None else features // full[kind] * kept[kind]

        for path, owner in layout["linears"].items():
            if _is_inside(path, gone):
                continue
            linear = block.get_submodule(path)
            _shrink_linear(
                linear, size(linear.out_features, owner.get("rows")), size(linear.in_features, owner.get("cols"))
            )
        for path in layout.get("biases", ()):
            if _is_inside(path, gone):
                continue
            linear = block.get_submodule(path)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device))
        for path, kind in layout["norms"].items():
            if _is_inside(path, gone):
                continue
            norm = block.get_submodule(path)
            _shrink_norm(norm, size(_shape(norm.weight)[0], kind))
        if kept.get("kv"):
            _set_heads(block.get_submodule(layout["attention"]), full["kv"], kept["kv"])
        if "value" in kept:
            values = full["value"] // full.get("kv", 1) * kept.get("kv", 1)  # of the heads that are left
            _select_values(block.get_submodule(layout["attention"]), layout, values)
        for path, (read, written) in layout["selections"].items():
            _select_residual(block.get_submodule(path), kept[read], kept[written], full[written])
        if layout["selections"] and _is_like_llamas(block):
            block.forward = MethodType(forward, block)


def _check_layout(model: PreTrainedModel, layout: Any) -> None:
    """Raise a ValueError of one line where a checkpoint's layout does not fit the stock model it is about."""
    try:
        blocks, full, kept = model.get_submodule(layout["container"]), layout["full"], layout["kept"]
        _require(isinstance(blocks, nn.ModuleList) and len(blocks) > 0, "container", layout["container"])
        for kind in full.keys() | kept.keys():
            _require(len(full[kind]) == len(kept[kind]) == len(blocks), "counts per block of", kind)
            pairs = zip(full[kind], kept[kind], strict=True)
            valid = all(type(f) is type(k) is int and 0 <= k <= f and f > 0 for f, k in pairs)
            _require(valid and (0 not in kept[kind] or kind in ("kv", "mlp")), "counts of", kind)
        for index, block in enumerate(blocks):
            _check_block(model, dict(block.named_modules()), {kind: full[kind][index] for kind in full}, layout)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"config.json: atp.blocks is not a layout of {type(model).__name__} ({error!r})") from None


def _check_block(model: PreTrainedModel, modules: dict[str, Any], full: dict[str, int], layout: dict) -> None:
    """Every path is that of such a module, and groups of equal size make up every side that they own."""
    for part in ("attention", "mlp")[: 1 + ("mlp" in layout)]:
        _require(layout[part] in modules, part, layout[part])
    for path, owner in layout["linears"].items():
        linear = modules[path]
        _require(isinstance(linear, nn.Linear) and set(owner) <= {"rows", "cols"}, "linear layer", path)
        for side, features in (("rows", linear.out_features), ("cols", linear.in_features)):
            _require(side not in owner or features % full[owner[side]] == 0, f"{side} of", path)
    for path in layout.get("biases", ()):
        _require(isinstance(modules[path], nn.Linear), "bias", path)
    for path, kind in layout["norms"].items():
        shape = _shape(modules[path].weight)
        _require(len(shape) == 1 and shape[0] % full[kind] == 0, "norm", path)
    if "value" in full:
        for side in ("rows", "cols"):
            owned = [path for path, owner in layout["linears"].items() if owner.get(side) == "value"]
            inside = [path for path in owned if path.rpartition(".")[0] == layout["attention"]]
            _require(len(inside) == len(owned) == 1, f"{side} of", "value")
    if "kv" in full:
        _require(model.config.num_attention_heads % full["kv"] == 0, "counts of", "kv")
    for path, kinds in layout["selections"].items():
        sizes = {full[kind] for kind in kinds}
        _require(path in modules and len(kinds) == 2 and sizes == {model.config.hidden_size}, "selection", path)


def _require(holds: bool, what: str, which: object) -> None:
    if not holds:
        raise ValueError(f"config.json: atp.blocks: the {what} {which!r} cannot be used with this model")


def _check_indices(model: PreTrainedModel) -> None:
    """Raise a ValueError of one line where dimensions that a block reads or writes are not ascending ones it has."""
    layout = model.config.atp["blocks"]
    for index, block in enumerate(model.get_submodule(layout["container"])):
        for path, name, size in _indices(block, layout):
            chosen = block.get_submodule(path).get_buffer(name)
            if chosen.is_meta or len(chosen) == 0:
                continue
            if chosen[0] < 0 or chosen[-1] >= size or not (chosen.diff() > 0).all():
                where = f"{layout['container']}.{index}.{path}.{name}"
                raise ValueError(f"{where} is missing or holds no ascending dimensions below {size}")


def _indices(block: nn.Module, layout: dict) -> list[tuple[str, str, int]]:
    """Buffers of indices in a block: the path of their module, their name, and how many there are to choose from."""
    found = []
    for path in layout["selections"]:
        size: Any = block.get_submodule(path).residual_size
        found += [(path, "residual_in", size), (path, "residual_out", size)]
    if "value" in layout["kept"]:
        path = layout["attention"]
        sizes: Any = block.get_submodule(path).value_sizes
        found += [(path, "value_rows", sizes[0]), (path, "value_columns", sizes[1])]
    return found


def _shrink_linear(linear: nn.Linear, out_features: int, in_features: int) -> None:
    linear.out_features, linear.in_features = out_features, in_features
    if _is_partitioned(linear.weight):
        has_bias, like = linear.bias is not None, {"device": linear.weight.device, "dtype": linear.weight.dtype}
        smaller = nn.Linear(in_features, out_features, has_bias, **like)  # partitioned as it is made
        linear.weight, linear.bias = smaller.weight, smaller.bias
        return
    linear.weight = nn.Parameter(linear.weight.detach()[:out_features, :in_features].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:out_features].clone())


def _shrink_norm(norm: Any, features: int) -> None:
    if _is_partitioned(norm.weight):
        norm.weight = nn.Parameter(norm.weight.new_ones(features))
    else:
        norm.weight = nn.Parameter(norm.weight.detach()[:features].clone())


def _is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed has left this process a part of it, flat, while the model is made (ZeRO-3)."""
    return hasattr(parameter, "ds_shape")


def _shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class LeftOut(nn.Module):
    """In place of an attention or an MLP that is gone: it writes nothing.

    An attention keeps its place in a cache, one number a token, so that positions and masks are what they were.
    """

    def __init__(self, cache_index: int | None) -> None:
        super().__init__()
        self.cache_index = cache_index

    def forward(self, hidden_states: Tensor, *_args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """Zeros like `hidden_states`, `(rows, tokens, hidden_size)`."""
        written = hidden_states.new_zeros(hidden_states.shape)
        if self.cache_index is None:
            return written
        for cache in (value for value in kwargs.values() if isinstance(value, Cache)):
            place = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(place, place, self.cache_index)
        return written, None


def _leave_out(block: nn.Module, path: str, cache_index: int | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, LeftOut(cache_index))


def _is_inside(path: str, parents: list[str]) -> bool:
    return any(path.startswith(f"{parent}.") for parent in parents)


class _BlockConfig:
    """A model's config as one attention sees it: `own` values first, everything else read through."""

    def __init__(self, config: PreTrainedConfig, own: dict[str, int]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name == "_config":  # absent while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def _set_heads(attention: Any, full: int, kept: int) -> None:
    """Head counts for attentions that split packed projections by them (Phi-3); others go by shapes."""
    heads = attention.config.num_attention_heads // full * kept
    attention.config = _BlockConfig(attention.config, {"num_attention_heads": heads, "num_key_value_heads": kept})
    for name, count in (("num_heads", heads), ("num_key_value_heads", kept)):
        if name in vars(attention):
            setattr(attention, name, count)


def _select_residual(module: Any, read: int, written: int, hidden_size: int) -> None:
    device = next(module.parameters()).device
    module.register_buffer("residual_in", torch.arange(read, device=device))
    module.register_buffer("residual_out", torch.arange(written, device=device))
    module.residual_size = hidden_size
    module.register_forward_pre_hook(_gather, with_kwargs=True)
    module.register_forward_hook(_scatter)


def _gather(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (_kept(args[0], module.residual_in), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _kept(kwargs["hidden_states"], module.residual_in)}


def _scatter(module: Any, _args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    written = output[0] if isinstance(output, tuple) else output
    residual = _spread(written, module.residual_out, module.residual_size)
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def _spread(x: Tensor, index: Tensor, size: int) -> Tensor:
    """`(..., size)`, `x` at `index` of the last dimension and zeros elsewhere."""
    return x.new_zeros(*x.shape[:-1], size).scatter_(-1, index.expand_as(x), x)


def _kept(x: Tensor, index: Tensor) -> Tensor:
    """`x[..., index]`; on CPUs `gather` takes less than half the time of `index_select`."""
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def _select_values(attention: Any, layout: dict, full: int) -> None:
    """Let `attention` take values of fewer dimensions for values of `full`, all KV heads', that are zero elsewhere."""
    names = {
        side: path.rpartition(".")[2]
        for path, owner in layout["linears"].items()
        for side, kind in owner.items()
        if kind == "value"
    }
    reader, writer = (attention.get_submodule(names[side]) for side in ("rows", "cols"))
    columns = full * (attention.config.num_attention_heads // attention.config.num_key_value_heads)
    attention.register_buffer("value_rows", torch.arange(reader.out_features, device=reader.weight.device))
    attention.register_buffer("value_columns", torch.arange(writer.in_features, device=writer.weight.device))
    attention.value_layers, attention.value_sizes = (names["rows"], names["cols"]), (full, columns)
    stock: Any = type(attention)
    attention.__class__ = _with_fewer_values(stock)


@functools.cache
def _with_fewer_values(stock: Any) -> Any:
    """A subclass of attention class `stock`."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stock.forward(_AsIfWhole(self), *args, **kwargs)

    def reduce(self: nn.Module, _protocol: Any) -> tuple:
        return _empty_with_fewer_values, (stock,), vars(self)

    return type(f"{PREFIX}{stock.__name__}", (stock,), {"forward": forward, "__reduce_ex__": reduce})


def _empty_with_fewer_values(stock: Any) -> nn.Module:
    """To copy and unpickle one of a class that no module holds."""
    made = _with_fewer_values(stock)
    return made.__new__(made)


class _AsIfWhole:
    """An attention as its own `forward` sees it: the values' layer gives all dimensions, the writer takes all."""

    def __init__(self, attention: nn.Module) -> None:
        self.__dict__["_attention"] = attention

    def __getattr__(self, name: str) -> Any:
        attention = self._attention
        found = getattr(attention, name)
        if name == attention.value_layers[0]:
            return lambda x: _spread(found(x), attention.value_rows, attention.value_sizes[0])
        if name == attention.value_layers[1]:
            return lambda x: found(_kept(x, attention.value_columns))
        return found


def _is_like_llamas(block: Any) -> bool:
    """Whether a block adds, norms and calls its halves as Llama's does, by the source of its `forward`."""
    if triton is None or not _same_forward(block, LlamaDecoderLayer):
        return False
    return all(_same_forward(norm, LlamaRMSNorm) for norm in (block.input_layernorm, block.post_attention_layernorm))


def _same_forward(module: nn.Module, known: type[nn.Module]) -> bool:
    try:
        own, other = ("".join(inspect.getsource(cls.forward).split()) for cls in (type(module), known))
    except (OSError, TypeError):  # no source at hand
        return False
    return own == other


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A block's own `forward`; by kernels, where they can, without the hooks that gather and scatter.

    It has that name for pickle, which looks it up on the block.
    """
    arguments = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
    if not _kernels_can(self, hidden_states):
        return type(self).forward(self, hidden_states, **arguments)
    attention, mlp = self.self_attn, self.mlp
    _, normed = _boundary(hidden_states, None, None, self.input_layernorm, attention.residual_in)
    update, _ = attention.forward(hidden_states=normed, **arguments)
    residual, normed = _boundary(
        hidden_states, update, _position(attention), self.post_attention_layernorm, mlp.residual_in
    )
    return _boundary(residual, mlp.forward(normed), _position(mlp), None, None)[0]


def _kernels_can(block: Any, x: Tensor) -> bool:
    """Not where gradients, float64 or a graph are wanted, weights lie elsewhere, or somebody looks into the block."""
    where = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not where or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    norms = (block.input_layernorm, block.post_attention_layernorm)
    halves = (block.self_attn, block.mlp)
    unseen = all(norm.weight.device == x.device and _hooks(norm) == (0, 0) for norm in norms)
    return unseen and all(_hooks(half) == (1, 1) for half in halves) and _builds(x.device)


@functools.cache
def _builds(device: torch.device) -> bool:
    """Whether kernels can be built there: that takes a C compiler, Python's headers, and a GPU that Triton knows."""
    try:
        _boundary(torch.ones(1, 16, device=device), None, None, None, None)
        return True
    except Exception as error:  # of compilers, drivers and Triton alike
        warnings.warn(f"Triton cannot build kernels here ({error}): computing without them", stacklevel=2)
        return False


def _hooks(module: nn.Module) -> tuple[int, int]:
    """How many there are before and after a module; `_gather` and `_scatter` are one each."""
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def _position(module: Any) -> Tensor:
    """For every residual dimension its place among those that `module` writes, or -1; made anew when those change."""
    written = module.residual_out
    state = (written.device, written.data_ptr(), None if written.is_inference() else written._version)
    if vars(module).get("_position_of") != state:
        position = torch.full((module.residual_size,), -1, dtype=torch.int32, device=written.device)
        position[written] = torch.arange(len(written), dtype=torch.int32, device=written.device)
        module._position_now, module._position_of = position, state
    return module._position_now


def _boundary(
    residual: Tensor, update: Tensor | None, position: Tensor | None, norm: Any, read: Tensor | None
) -> tuple[Tensor, Tensor]:
    """r + scatter(u), and dimensions `read` of its norm; r itself without an update, and nothing without a norm."""
    residual = residual.contiguous()
    hidden_size, rows = residual.shape[-1], residual.shape[:-1].numel()
    written = 1 if update is None else update.shape[-1]
    kept = 1 if read is None else len(read)
    summed = residual if update is None else torch.empty_like(residual)
    normed = residual.new_empty(*residual.shape[:-1], 0 if read is None else kept)
    block = triton.next_power_of_2(hidden_size)
    with torch.cuda.device_of(residual):
        _boundary_kernel[(rows,)](
            residual,
            None if update is None else update.contiguous(),
            position,
            None if norm is None else norm.weight,
            read,
            summed,
            normed,
            written,
            kept,
            0.0 if norm is None else norm.variance_epsilon,
            hidden_size,
            block,
            triton.next_power_of_2(written),
            triton.next_power_of_2(kept),
            num_warps=min(max(block // 512, 1), 16),
        )
    return summed, normed


if triton is not None:

    @triton.jit
    def _boundary_kernel(  # type: ignore[no-untyped-def]  # of no types of Python's
        residual,
        update,
        position,
        weight,
        read,
        summed,
        normed,
        written,
        kept,
        eps,
        hidden_size: tl.constexpr,
        block: tl.constexpr,
        block_written: tl.constexpr,
        block_kept: tl.constexpr,
    ):
        """A program per row, which lies in registers, where `tl.gather` spreads it and draws from it."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, block)
        inside = column < hidden_size
        x = tl.load(residual + row * hidden_size + column, mask=inside, other=0).to(tl.float32)
        if update is not None:
            place = tl.arange(0, block_written)
            u = tl.load(update + row * written + place, mask=place < written, other=0)
            where = tl.load(position + column, mask=inside, other=-1)
            u = tl.where(where >= 0, tl.gather(u, tl.where(where >= 0, where, 0), 0).to(tl.float32), 0.0)
            rounded = (x + u).to(summed.dtype.element_ty)
            tl.store(summed + row * hidden_size + column, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if weight is not None:
            n = x * tl.rsqrt(tl.sum(x * x) / hidden_size + eps)
            n = n.to(normed.dtype.element_ty).to(tl.float32)  # as Llama's norm rounds
            n = (n * tl.load(weight + column, mask=inside, other=0).to(tl.float32)).to(normed.dtype.element_ty)
            place = tl.arange(0, block_kept)
            index = tl.load(read + place, mask=place < kept, other=0).to(tl.int32)
            tl.store(normed + row * kept + place, tl.gather(n, index, 0), mask=place < kept)
