"""Propagation: block after block, what stays is refitted so that the pruned model's stream follows the dense model's.

A layer that is refitted by itself makes up for its own lost inputs, not for what went wrong before it. Here its inputs
are those of the pruned stream, and its target is what the dense model's layer writes, and what the pruned stream lacks
before it (the global propagation of Shin et al., EMNLP 2024):

    minimise over W   mean |W x - t|^2 + PRIOR * median(diag mean x xᵀ) * |W - W0|^2,    W0: refitted by itself

Where an RMS norm reads what the layer writes (Gemma 2 and 3, OLMo 2), t is what the norm must be given, to first order
at the dense model's root mean square. Only writers are refitted, and only in blocks whose output is their input plus
what attention and MLP bring to it. Held for all calibration rows: two streams and, within a block, what both writers
write and what the dense stream was before it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atp.criteria.statistics import Batches, removed_after, watched_inputs
from atp.criteria.surgeon import refitted_base, typical
from atp.layers import Attachment
from atp.structure.discovery import Block
from atp.structure.live import adapter_delta, base_layer

PRIOR = 1.0
"""Pull towards the layer refitted by itself, relative to what a typical input holds. SmolLM2-135M, 40 % of width, 64
rows, nats a token: 3.387 refitted by itself, 3.305 at 0.3, 3.296 at 1."""

ADDITIVE = 2e-2
"""A block counts as additive where its output is the sum up to this relative error (bfloat16 has 4e-3)."""

LEAST_GAIN = 0.1
"""Of a norm after a writer, relative to its mean gain: channels with less are asked for less than what is missing."""

_PER_CALL = {"past_key_values": None, "use_cache": False}


@dataclass(eq=False)
class Stream:
    """One calibration batch on its way: hidden states, `(rows, tokens, hidden)`, of both models before a block."""

    dense: Tensor
    pruned: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class _Way:
    """How what a writer writes reaches the stream: through an RMS norm or not, then times a factor (Granite's)."""

    writer: nn.Module
    norm: nn.Module | None
    factor: float

    def brings(self, written: Tensor) -> Tensor:
        """What the stream is given where the writer has written `written`."""
        return self.factor * (written if self.norm is None else self.norm(written))

    def wanted(self, written: Tensor, missing: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to write in place of `written` to bring `missing` besides, and how much each token counts (`None`: 1).

        The norm is taken as linear, with the root mean square of `written`; where its gain is next to nothing, so is
        what a channel can bring, and no more is asked of it.
        """
        written, missing = written.float(), missing.float() / self.factor
        if self.norm is None:
            return written + missing, None
        gain = self.norm(torch.ones_like(written[:1, :1])).float()
        size = written.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        floor = LEAST_GAIN * gain.abs().mean()
        return written + size * missing * gain / gain.square().clamp_min(floor.square()), 1 / size


class _EnoughError(Exception):
    """Ends a forward pass that has been seen as far as it is needed."""


@torch.no_grad()
def follow(
    attachment: Attachment,
    writers: Mapping[str, Tensor],
    original: Callable[[Block], AbstractContextManager],
    forward: Callable[[Any], object],
    batches: Batches,
) -> None:
    """Refit `writers` in place, each by itself and then to the stream.

    Args:
        attachment: under the masks that are final.
        writers: the layers to be refitted, by path, as they were at first, and which of their inputs stay, bool,
            `(in_features,)`.
        original: within it, a block is the dense model's: masks off, weights as they were.
        forward: runs the model on one batch.
    """
    lm, blocks = attachment.lm, attachment.space.structure.blocks
    was_training = lm.training
    lm.eval()
    try:
        streams, precision = _capture([lm.get_submodule(block.path) for block in blocks], forward, batches)
        with precision():
            for block in blocks:
                _follow_block(attachment, block, writers, original, streams)
    finally:
        lm.train(was_training)


def _follow_block(
    attachment: Attachment,
    block: Block,
    writers: Mapping[str, Tensor],
    original: Callable[[Block], AbstractContextManager],
    streams: list[Stream],
) -> None:
    module = attachment.lm.get_submodule(block.path)
    attention, mlp = _ways(attachment, block, module, streams[0])
    before = [stream.dense for stream in streams]
    with original(block):
        by_attention, by_mlp, additive, grams = _dense_pass(module, block, (attention, mlp), writers, streams)
    for path, gram in grams.items():
        layer, keep = attachment.modules[path], writers[path]
        base_layer(layer).weight.copy_(refitted_base(layer, gram, torch.ones_like(keep), keep))
    if additive and block.attention.writer.path in writers:
        pairs = (
            (_inputs(module, attention.writer, s.pruned, s.calls[block.index]), *attention.wanted(o, dense - s.pruned))
            for s, o, dense in zip(streams, by_attention, before, strict=True)
        )
        _refit(attention.writer, writers[block.attention.writer.path], pairs)
    middle = (dense + attention.brings(o) for dense, o in zip(before, by_attention, strict=True))
    if additive and block.mlp.writer.path in writers:
        read: list[Tensor] = []
        pairs = (
            (x, *mlp.wanted(g, dense - s.pruned))
            for s, g, dense, x in zip(
                streams, by_mlp, middle, _up_to(mlp, module, attention, block.index, streams, read), strict=True
            )
        )
        _refit(mlp.writer, writers[block.mlp.writer.path], pairs)
        for stream, x in zip(streams, read, strict=True):
            stream.pruned = stream.pruned + mlp.brings(mlp.writer(x))
    else:
        for stream in streams:
            stream.pruned = _call(module, stream.pruned, stream.calls[block.index])


def _dense_pass(
    module: nn.Module, block: Block, ways: tuple[_Way, _Way], writers: Mapping[str, Tensor], streams: list[Stream]
) -> tuple[list[Tensor], list[Tensor], bool, dict[str, Tensor]]:
    """Take the dense streams past a block.

    Returns:
        What attention's writer writes, and the MLP's, a batch each; whether the block adds them to its input and does
        no more; and sums of x xᵀ over the inputs of those of `writers` that lose some, by path.
    """
    attention, mlp = ways
    layers = {block.attention.writer.path: attention.writer, block.mlp.writer.path: mlp.writer}
    losing = {path: layer for path, layer in layers.items() if path in writers and not writers[path].all()}
    grams: dict[str, Tensor] = {}

    def see(path: str, x: Tensor) -> None:
        grams.setdefault(path, x.new_zeros(x.shape[-1], x.shape[-1])).addmm_(x.T, x)

    by_attention: list[Tensor] = []
    by_mlp: list[Tensor] = []
    additive = True
    for stream in streams:
        with _outputs(attention.writer) as o, _outputs(mlp.writer) as g, watched_inputs(losing, see):
            after = _call(module, stream.dense, stream.calls[block.index])
        off = stream.dense + attention.brings(o[0]) + mlp.brings(g[0]) - after
        additive &= bool(off.norm() <= ADDITIVE * after.norm())
        by_attention += o
        by_mlp += g
        stream.dense = after
    return by_attention, by_mlp, additive, grams


def _up_to(
    mlp: _Way, module: nn.Module, attention: _Way, index: int, streams: list[Stream], read: list[Tensor]
) -> Iterator[Tensor]:
    """Take the pruned streams past attention; what the MLP's writer reads, kept in `read`."""
    for stream in streams:
        with _outputs(attention.writer) as o:
            read.append(_inputs(module, mlp.writer, stream.pruned, stream.calls[index]))
        stream.pruned = stream.pruned + attention.brings(o[0])
        yield read[-1]


def _ways(attachment: Attachment, block: Block, module: nn.Module, stream: Stream) -> tuple[_Way, _Way]:
    """Attention's and the MLP's way to the stream, seen in one pass of the block."""
    attention, mlp = (attachment.modules[part.writer.path] for part in (block.attention, block.mlp))
    norms = [n for n in module.children() if _is_rms_norm(n, attachment.space.structure.hidden_size)]
    reads: list[tuple[nn.Module, Tensor]] = []

    def hook(norm: nn.Module, args: tuple, _output: object) -> None:
        reads.append((norm, args[0]))

    with (
        removed_after([norm.register_forward_hook(hook) for norm in norms]),
        _outputs(attention) as o,
        _outputs(mlp) as g,
    ):
        _call(module, stream.pruned, stream.calls[block.index])
    factor = getattr(attachment.lm.config, "residual_multiplier", 1.0)

    def way(writer: nn.Module, written: Tensor) -> _Way:
        return _Way(writer, next((norm for norm, x in reads if x is written), None), factor)

    return way(attention, o[0]), way(mlp, g[0])


def _is_rms_norm(module: nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (hidden,) and getattr(module, "bias", None) is None


def _refit(module: nn.Module, keep: Tensor, pairs: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Refit kept columns to `pairs` of inputs, wanted outputs and the tokens' weights, `(..., 1)`."""
    base = base_layer(module)
    device, delta = base.weight.device, adapter_delta(module)
    kept = torch.nonzero(keep).flatten().to(device)
    start = (base.weight.float() + delta)[:, kept]
    gram = torch.zeros(len(kept), len(kept), device=device)
    missing = torch.zeros(len(kept), len(start), device=device)
    bias = 0.0 if base.bias is None else base.bias.float()
    for x, target, weight in pairs:
        x = x.flatten(0, -2).float()[:, kept]
        off = target.flatten(0, -2).float() - bias - x @ start.T
        if weight is not None:
            x, off = x * weight.flatten(0, -2), off * weight.flatten(0, -2)
        gram.addmm_(x.T, x)
        missing.addmm_(x.T, off)
    gram.diagonal().add_(PRIOR * typical(gram))
    base.weight[:, kept] += torch.linalg.solve(gram, missing).T.to(base.weight.dtype)


def _capture(
    blocks: list[nn.Module], forward: Callable[[Any], object], batches: Batches
) -> tuple[list[Stream], Callable[[], AbstractContextManager]]:
    """What every block is called with, and the precision (autocast) it is called in.

    Only on the first batch do blocks compute; after it they pass on what they are given, in the form they have shown.
    """
    streams: list[Stream] = []
    in_tuple: dict[int, bool] = {}
    precision: Callable[[], AbstractContextManager] = nullcontext

    def recording(index: int, own: Callable) -> Callable:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal precision
            hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
            if index == 0:
                streams.append(Stream(hidden, hidden, []))
                precision = _autocast_as_now(hidden.device.type)
            streams[-1].calls.append((args, {k: _PER_CALL.get(k, v) for k, v in kwargs.items()}))
            if index == len(blocks) - 1:
                raise _EnoughError
            if index in in_tuple:
                return (hidden,) if in_tuple[index] else hidden
            output = own(hidden, *args, **kwargs)
            in_tuple[index] = isinstance(output, tuple)
            return output

        return instead

    with _forwards_replaced(blocks, recording):
        for batch in batches:
            with suppress(_EnoughError):
                forward(batch)
    return streams, precision


@contextmanager
def _forwards_replaced(modules: list[nn.Module], by: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """`by(index, forward)` in place of each module's `forward`."""
    own = [vars(module).get("forward") for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = by(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _autocast_as_now(device: str) -> Callable[[], AbstractContextManager]:
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype) if enabled else nullcontext()


def _call(module: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    args, kwargs = call
    output = module(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _inputs(module: nn.Module, layer: nn.Module, hidden: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    """What `layer` reads while its block runs on `hidden`; the block runs no further."""
    found: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple) -> None:
        found.append(args[0])
        raise _EnoughError

    with removed_after([layer.register_forward_pre_hook(hook)]), suppress(_EnoughError):
        _call(module, hidden, call)
    return found[0]


@contextmanager
def _outputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    with removed_after([layer.register_forward_hook(lambda _layer, _args, output: found.append(output))]):
        yield found
