"""Kernels, and one layer that is built of them, beside the PyTorch operations that they stand in for.

The layer is a pre-norm one with the shapes of a model's first block, cut by a random decision. It leaves out
attention's scores (what q gives stands in for what attention gives), rotary embeddings and LoRA. Single operations are
set beside a copy of as many bytes as they must move. Kernels are there where Triton and a GPU are, the rest everywhere.
On a GPU every case is timed as a CUDA graph, without the host.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from transformers import PreTrainedModel

from atp.bench.copies import mask_at_random, on_the_same_tensors
from atp.bench.timing import Case, captured
from atp.config import ATPConfig
from atp.errors import ConfigError, UnsupportedModelError
from atp.layers import attachment_of
from atp.ops.boundary import add_norm_gather
from atp.ops.compaction import compact_weight
from atp.ops.decode import gather_linear_scatter
from atp.ops.gated import gated
from atp.ops.implementation import uses_triton
from atp.ops.selection import Selection, gather_features, scatter_features
from atp.structure.discovery import MLP, Attention
from atp.structure.space import Axis

_EPS = 1e-5
_BEYOND_CACHES = 256 << 20
"""Bytes of weights that decoding goes through before it comes back to the first."""

_MOST_COPIES = 64
"""Of a layer, for that: a toy's would be many thousands."""

_AT_ONCE = _MOST_COPIES
"""Times in a row that a GPU does what is timed: an operation there is over before the next is launched. Not fewer than
copies, so that each is used."""

Boundary = Callable[[Tensor, Tensor, Tensor, Selection | None, Selection | None], tuple[Tensor, Tensor]]
Gate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Linear:
    """One layer's weight, and which of its rows and columns stay; None for all.

    Attributes:
        read, written: which dimensions of the residual stream it reads or writes, where it does and not all.
    """

    weight: Tensor
    rows: Selection | None = None
    cols: Selection | None = None
    read: Selection | None = None
    written: Selection | None = None

    @property
    def compact(self) -> "_Linear":
        """What stays of it."""
        return replace(self, weight=compact_weight(self.weight, self.rows, self.cols, impl="eager"))

    @property
    def dense(self) -> "_Linear":
        """All of it, nothing to choose."""
        return _Linear(self.weight)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A pre-norm layer without attention's scores; `readers` of attention, then of the MLP."""

    attention: tuple[_Linear, ...]
    attention_writer: _Linear
    mlp: tuple[_Linear, ...]
    mlp_writer: _Linear

    @property
    def linears(self) -> tuple[_Linear, ...]:
        """In the order in which they run."""
        return (*self.attention, self.attention_writer, *self.mlp, self.mlp_writer)

    @property
    def parameters(self) -> int:
        """Weights of all of them."""
        return sum(one.weight.numel() for one in self.linears)

    def each(self, change: Callable[[_Linear], _Linear]) -> "_Layer":
        """The layer with `change` done to every linear."""
        attention, mlp = tuple(map(change, self.attention)), tuple(map(change, self.mlp))
        return _Layer(attention, change(self.attention_writer), mlp, change(self.mlp_writer))

    def run(self, residual: Tensor, normed: Tensor, norm: Tensor, boundary: Boundary, gate: Gate) -> Tensor:
        """The stream after it."""
        heads, *_ = [linear(normed, reader.weight) for reader in self.attention]
        update = linear(heads[..., : self.attention_writer.weight.shape[1]], self.attention_writer.weight)
        residual, normed = boundary(residual, update, norm, self.attention_writer.written, self.mlp[0].read)
        given = [linear(normed, reader.weight) for reader in self.mlp]
        first, second = given if len(given) == 2 else given[0].chunk(2, -1)
        update = linear(gate(first, second), self.mlp_writer.weight)
        return boundary(residual, update, norm, self.mlp_writer.written, self.attention[0].read)[0]


def kernel_cases(model: PreTrainedModel, config: ATPConfig, tokens: int) -> dict[str, list[Case]]:
    """Cases of `layer` and of every operation, forwards, in the dtype of `model`, where it lies.

    Args:
        tokens: of one sequence; decoding reads one.

    Raises:
        ConfigError: where the space leaves every layer whole.
        UnsupportedModelError: where the MLP has no gate.
    """
    if config.space == "depth":
        raise ConfigError("space 'depth' removes whole layers, of which no kernel has less to do: use width or disp")
    masked = on_the_same_tensors(model)
    mask_at_random(masked, config)
    full = _first_layer(masked)
    like = model.get_input_embeddings().weight
    hidden = model.config.get_text_config().hidden_size
    stream = torch.randn(tokens, hidden, device=like.device, dtype=like.dtype)
    norm = torch.randn(hidden, device=like.device, dtype=like.dtype)
    cases = {
        "layer": _layers(full, stream, norm),
        "add + norm + gather": _boundaries(full, stream, norm),
        "gated product": _gates(full, stream),
        "compaction": _compactions(full),
        "decode, one token": _decodes(full, stream[:1]),
    }
    if stream.device.type != "cuda":
        return cases
    return {name: [captured(case, _AT_ONCE) for case in of_bench] for name, of_bench in cases.items()}


def _first_layer(model: PreTrainedModel) -> _Layer:
    attachment = attachment_of(model)
    assert attachment is not None
    block = attachment.space.structure.blocks[0]
    table = {one.path: one for one in attachment.space.linears}

    def chosen(axis: Axis | None) -> Selection | None:
        if axis is None:
            return None
        mask = attachment.masks[axis.set]
        return Selection.of(mask[axis.owner_on(mask.device)] > 0)

    def of(path: str) -> _Linear:
        weight = attachment.lm.get_submodule(path).weight.detach()
        return _Linear(weight, chosen(table[path].rows), chosen(table[path].cols))

    def readers(half: Attention | MLP) -> tuple[_Linear, ...]:
        return tuple(replace(one, read=one.cols) for one in (of(reader.path) for reader in half.readers))

    def writer(half: Attention | MLP) -> _Linear:
        one = of(half.writer.path)
        return replace(one, written=one.rows)

    attention, mlp = block.attention, block.mlp
    if len(mlp.readers) == 1 and mlp.readers[0].out_features == mlp.writer.in_features:
        raise UnsupportedModelError(
            f"{type(attachment.lm).__name__} has MLPs without a gate, for which there is no kernel to time: use "
            "atp bench train-step or infer"
        )
    return _Layer(readers(attention), writer(attention), readers(mlp), writer(mlp))


def _layers(full: _Layer, stream: Tensor, norm: Tensor) -> list[Case]:
    compact, dense = full.each(lambda one: one.compact), full.each(lambda one: one.dense)
    limit = compact.parameters / dense.parameters

    def case(name: str, layer: _Layer, boundary: Boundary, gate: Gate, limit: float | None) -> Case:
        normed = stream[:, : layer.attention[0].weight.shape[1]].clone()

        @torch.no_grad()
        def call() -> None:
            layer.run(stream, normed, norm, boundary, gate)

        return Case(name, call, limit)

    cases = [
        case("dense", dense, _with_index_operations, _plain_gate, None),
        case("compact, products alone", compact, _nothing_moved, _plain_gate, limit),
        case("compact, index operations", compact, _with_index_operations, _plain_gate, limit),
    ]
    if uses_triton(stream, "auto"):
        cases.append(case("compact, kernels", compact, _with_kernels, _kernel_gate, limit))
    return cases


def _boundaries(full: _Layer, stream: Tensor, norm: Tensor) -> list[Case]:
    written, read = full.attention_writer.written, full.mlp[0].read
    update = torch.randn(len(stream), _width(written, stream), device=stream.device, dtype=stream.dtype)
    moved = 2 * stream.numel() + update.numel() + len(stream) * _width(read, stream)
    return [
        _copy_of(moved, stream),
        Case("index operations", lambda: _with_index_operations(stream, update, norm, written, read), 1.0),
        *_with_triton(stream, lambda: _with_kernels(stream, update, norm, written, read)),
    ]


def _gates(full: _Layer, stream: Tensor) -> list[Case]:
    channels = full.mlp_writer.compact.weight.shape[1]
    gate, up = (torch.randn(len(stream), channels, device=stream.device, dtype=stream.dtype) for _ in range(2))
    return [
        _copy_of(3 * gate.numel(), stream),
        Case("two operations", lambda: _plain_gate(gate, up), 1.0),
        *_with_triton(stream, lambda: _kernel_gate(gate, up)),
    ]


def _compactions(full: _Layer) -> list[Case]:
    linears = full.linears
    moved = 2 * sum(one.compact.weight.numel() for one in linears)

    def each(impl: str) -> Callable[[], object]:
        return lambda: [compact_weight(one.weight, one.rows, one.cols, impl=impl) for one in linears]

    weight = linears[0].weight
    return [_copy_of(moved, weight), Case("indexing", each("eager"), 1.0), *_with_triton(weight, each("triton"))]


def _decodes(full: _Layer, token: Tensor) -> list[Case]:
    """Every linear of a layer once; so many layers in turn that no weight is still in a cache."""
    compact, dense = (full.each(lambda one: one.compact), full.each(lambda one: one.dense))

    def case(name: str, layer: _Layer, one: Callable[[Tensor, _Linear], object], limit: float | None) -> Case:
        copies = range(_copies(layer.parameters * token.element_size()))
        layers = [layer.each(lambda part: replace(part, weight=part.weight.clone())).linears for _ in copies]
        inputs = [token.new_ones(1, _inputs(part)) for part in layer.linears]
        turn = cycle(layers)

        @torch.no_grad()
        def call() -> None:
            for x, part in zip(inputs, next(turn), strict=True):
                one(x, part)

        return Case(name, call, limit)

    limit = compact.parameters / dense.parameters
    cases = [
        case("dense", dense, _decoded_by("eager"), None),
        _copy_of(compact.parameters, token, _copies(compact.parameters * token.element_size())),
        case("index operations", compact, _decoded_by("eager"), limit),
    ]
    if uses_triton(token, "auto"):
        cases.append(case("kernels", compact, _decoded_by("triton"), limit))
    return cases


def _decoded_by(impl: str) -> Callable[[Tensor, _Linear], object]:
    return lambda x, one: gather_linear_scatter(x, one.weight, read=one.read, written=one.written, impl=impl)


def _inputs(one: _Linear) -> int:
    return one.weight.shape[1] if one.read is None else len(one.read.position)


def _with_kernels(
    residual: Tensor, update: Tensor, norm: Tensor, written: Selection | None, read: Selection | None
) -> tuple[Tensor, Tensor]:
    return add_norm_gather(residual, update, norm, _EPS, written=written, read=read, impl="triton")


def _with_index_operations(
    residual: Tensor, update: Tensor, norm: Tensor, written: Selection | None, read: Selection | None
) -> tuple[Tensor, Tensor]:
    residual = residual + (update if written is None else scatter_features(update, written.index, len(norm)))
    normed = rms_norm(residual, norm.shape, norm, _EPS)
    return residual, normed if read is None else gather_features(normed, read.index)


def _nothing_moved(
    residual: Tensor, _update: Tensor, _norm: Tensor, _written: Selection | None, read: Selection | None
) -> tuple[Tensor, Tensor]:
    """As many dimensions, but the first ones: views, so that the products alone are left."""
    return residual, residual[..., : _width(read, residual)]


def _plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _kernel_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gated(gate, up, impl="triton")


def _width(chosen: Selection | None, stream: Tensor) -> int:
    return stream.shape[-1] if chosen is None else len(chosen.index)


def _copies(moved: int) -> int:
    """So many that what one of them moves, in bytes, is in no cache when its turn comes again."""
    return min(_MOST_COPIES, 1 + _BEYOND_CACHES // moved)


def _copy_of(elements: int, like: Tensor, copies: int = 1) -> Case:
    """Reading and writing `elements` in all, of one of so many copies at a call."""
    sources = [torch.randn(elements // 2, device=like.device, dtype=like.dtype) for _ in range(copies)]
    turn = cycle([(torch.empty_like(source), source) for source in sources])

    def call() -> Tensor:
        target, source = next(turn)
        return target.copy_(source)

    return Case("copy of as many bytes", call)


def _with_triton(like: Tensor, call: Callable[[], object]) -> list[Case]:
    return [Case("kernels", call, 1.0)] if uses_triton(like, "auto") else []
