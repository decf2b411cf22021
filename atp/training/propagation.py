"""Propagation: block after block, what stays is refitted so that the pruned model's stream follows the dense model's.

A layer that is refitted by itself makes up for its own lost inputs, not for what went wrong before it. Here its inputs
are those of the pruned stream, and its target is what the dense model's layer writes, and what the pruned stream lacks
before it (the global propagation of Shin et al., EMNLP 2024):

    minimise over W   mean |W x - t|^2 + PRIOR * median(diag mean x xᵀ) * |W - W0|^2,    W0: as it was at first

Where an RMS norm reads what the layer writes (Gemma 2 and 3, OLMo 2), t is what the norm must be given, to first order
at the dense model's root mean square. Readers of MLPs are refitted too, for the same target (`refitting`). Where a
block's output is more than its input and what attention and MLP bring to it, t is what the dense layer writes and no
more. Held for all calibration rows (of several processes each holds its share): two streams and, within a block, what
both writers write, the dense stream before them, and what is read.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from atp.criteria.statistics import Batches
from atp.layers import Attachment
from atp.passes import (
    as_given,
    beside,
    block_calls,
    first_output,
    giving,
    inputs_of,
    outputs_of,
    real_tokens,
    removed_after,
)
from atp.processes import counted, dealt
from atp.structure.discovery import Block
from atp.structure.sharding import gathered, is_sharded
from atp.training.refitting import refit_readers, refit_writer

ADDITIVE = 2e-2
"""A block counts as additive where its output is the sum up to this relative error (bfloat16 has 4e-3)."""

LEAST_GAIN = 0.1
"""Of a norm after a writer, relative to its mean gain: channels with less are asked for less than what is missing."""


@dataclass(eq=False)
class Stream:
    """One calibration batch, number `index` of all, on its way.

    `dense`, `pruned`: hidden states before a block, `(rows, tokens, hidden)`, of both models.
    `real`: which tokens are no padding, bool, `(rows, tokens)`; None: all.
    """

    index: int
    dense: Tensor
    pruned: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    real: Tensor | None = None

    def of_real(self, x: Tensor) -> Tensor:
        """Of `x`, `(rows, tokens, features)`, what is no padding: `x`, or `(1, real tokens, features)`."""
        return x if self.real is None else x[self.real.to(x.device)][None]


@dataclass(frozen=True, eq=False)
class _Way:
    """How what a writer writes reaches the stream: through an RMS norm or not, then times a factor (Granite's).

    `module` is attention, or the MLP, whose output this is; `beside` what it returns beside it, None if it is no tuple.
    """

    module: nn.Module
    writer: nn.Module
    norm: nn.Module | None
    factor: float
    beside: int | None

    def brings(self, written: Tensor) -> Tensor:
        """What the stream is given where the writer has written `written`."""
        return self.factor * (written if self.norm is None else self.norm(written))

    def wanted(self, written: Tensor, kept: Tensor, missing: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to write in place of `written` to bring `missing` besides, and how much each token counts (`None`: 1).

        The norm is taken as linear, with the root mean square of `kept`, what of `written` it will be given; where its
        gain is next to nothing, so is what a channel can bring, and no more is asked of it.
        """
        written, missing = written.float(), missing.float() / self.factor
        if self.norm is None:
            return written + missing, None
        gain = self.norm(torch.ones_like(written[:1, :1])).float()
        size = kept.float().square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        floor = LEAST_GAIN * gain.abs().mean()
        return written + size * missing * gain / gain.square().clamp_min(floor.square()), 1 / size

    def gives(self, written: Tensor) -> AbstractContextManager:
        """Within it the module computes nothing, and gives `written` for its writer's output."""
        return giving(self.module, as_given(written, self.beside))


@torch.no_grad()
def follow(
    attachment: Attachment,
    writers: Mapping[str, Tensor | None],
    original: Callable[[Block], AbstractContextManager],
    forward: Callable[[Any], object],
    batches: Batches,
    compact: bool = True,
    reader_rounds: int = 1,
    quiet: bool = False,
) -> None:
    """Refit `writers` and the MLPs' readers in place, block after block.

    Args:
        attachment: under the masks that are final; its model in evaluation mode.
        writers: writers to refit, the MLPs' among them, by path, and which of their inputs stay, bool,
            `(in_features,)`, or None for all; they hold what they held at first. Those of halves that are switched off
            are passed over.
        original: within it, a block is the dense model's: masks off, weights as they were.
        forward: runs the model on one batch.
        compact: compute only what is kept, where layers are plain; they do so until masks are set.
        reader_rounds: of readers (`refit_readers`); 0: they are left as they are.
        quiet: no progress bars.
    """
    lm, blocks = attachment.lm, attachment.space.structure.blocks
    own = list(dealt(batches))
    seen = tqdm([one.batch for one in own], desc="atp: rows to refit to", leave=False, disable=quiet)
    with attachment.opened():
        modules = [lm.get_submodule(block.path) for block in blocks]
        sharded = any(is_sharded(p) for module in modules for p in module.parameters())
        calls, precision = block_calls(modules, forward, seen, to_the_end=sharded)
    streams = [
        Stream(one.index, each.hidden, each.hidden, each.of_block, real_tokens(one.batch))
        for one, each in zip(own, calls, strict=True)
        if one.counts
    ]
    for stream in streams:
        stream.pruned = attachment.along_stream(stream.dense)
    if compact:
        attachment.compact()  # not before: layers copy their kept weights when they first compute
    with precision():
        for block in tqdm(blocks, desc="atp: refitting blocks", leave=False, disable=quiet):
            with gathered(lm.get_submodule(block.path), changes=True):
                _follow_block(attachment, block, writers, original, reader_rounds, streams)


def _follow_block(
    attachment: Attachment,
    block: Block,
    writers: Mapping[str, Tensor | None],
    original: Callable[[Block], AbstractContextManager],
    reader_rounds: int,
    streams: list[Stream],
) -> None:
    module, index = attachment.lm.get_submodule(block.path), block.index
    dense = [stream.dense for stream in streams]
    with original(block):
        attention, mlp = _ways(attachment, block, module, streams[0])
        by_attention, by_mlp, additive = _dense_pass(module, index, attention, mlp, streams)

    def wanted(way: _Way, by_writer: list[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        for stream, whole, written in zip(streams, dense, by_writer, strict=True):
            missing = whole - stream.pruned if additive else torch.zeros_like(whole)
            target, weight = way.wanted(written, attachment.along_stream(written), missing)
            yield stream.of_real(target), None if weight is None else stream.of_real(weight)

    def real(inputs: list[Tensor]) -> list[Tensor]:
        return [stream.of_real(x) for stream, x in zip(streams, inputs, strict=True)]

    off = attachment.switched_off()
    if block.attention.path in off:
        read = [inputs_of(mlp.module, module, s.pruned, *s.calls[index]) for s in streams]
    else:
        read = [inputs_of(attention.writer, module, s.pruned, *s.calls[index]) for s in streams]
        if block.attention.writer.path in writers:
            keep = writers[block.attention.writer.path]
            refit_writer(attention.writer, keep, real(read), wanted(attention, by_attention))
        for i, stream in enumerate(streams):
            written = attention.writer(read[i])
            with attention.gives(written):
                read[i] = inputs_of(mlp.module, module, stream.pruned, *stream.calls[index])
            if additive:
                stream.pruned = stream.pruned + attention.brings(written)
    for i in range(len(streams)) if additive else ():
        dense[i] = dense[i] + attention.brings(by_attention[i])
    by_attention.clear()
    if block.mlp.path not in off:
        seeds = [s.index for s in streams]
        if reader_rounds:
            refit_readers(attachment, block.mlp, real(read), lambda: wanted(mlp, by_mlp), seeds, reader_rounds)
        read = [inputs_of(mlp.writer, mlp.module, x) for x in read]
        refit_writer(mlp.writer, writers[block.mlp.writer.path], real(read), wanted(mlp, by_mlp))
    for stream, x in zip(streams, read, strict=True):
        if not additive:
            stream.pruned = first_output(module, stream.pruned, *stream.calls[index])
        elif block.mlp.path not in off:
            stream.pruned = stream.pruned + mlp.brings(mlp.writer(x))


def _dense_pass(
    module: nn.Module, index: int, attention: _Way, mlp: _Way, streams: list[Stream]
) -> tuple[list[Tensor], list[Tensor], bool]:
    """Take the dense streams past a block.

    Returns:
        What attention's writer writes, and the MLP's, a batch each, and whether the block adds them to its input and
        does no more.
    """
    by_attention: list[Tensor] = []
    by_mlp: list[Tensor] = []
    additive = True
    for stream in streams:
        with outputs_of(attention.writer) as o, outputs_of(mlp.writer) as g:
            after = first_output(module, stream.dense, *stream.calls[index])
        off = stream.dense + attention.brings(o[0]) + mlp.brings(g[0]) - after
        additive &= bool(off.norm() <= ADDITIVE * after.norm())
        by_attention += o
        by_mlp += g
        stream.dense = after
    return by_attention, by_mlp, counted(not additive) == 0


def _ways(attachment: Attachment, block: Block, module: nn.Module, stream: Stream) -> tuple[_Way, _Way]:
    """Attention's and the MLP's way to the stream, seen in one pass of the block."""
    lm, factor = attachment.lm, getattr(attachment.lm.config, "residual_multiplier", 1.0)
    norms = [n for n in module.children() if _is_rms_norm(n, attachment.space.structure.hidden_size)]
    parts = [
        (lm.get_submodule(part.path), attachment.modules[part.writer.path]) for part in (block.attention, block.mlp)
    ]
    reads: list[tuple[nn.Module, Tensor]] = []

    def hook(norm: nn.Module, args: tuple, _output: object) -> None:
        reads.append((norm, args[0]))

    with removed_after([norm.register_forward_hook(hook) for norm in norms]), ExitStack() as hooks:
        seen = [[hooks.enter_context(outputs_of(layer)) for layer in part] for part in parts]
        first_output(module, stream.dense, *stream.calls[block.index])

    def way(part: tuple[nn.Module, nn.Module], output: Any, written: Tensor) -> _Way:
        norm = next((norm for norm, x in reads if x is written), None)
        return _Way(*part, norm, factor, beside(output))

    attention, mlp = (way(part, output[0], written[0]) for part, (output, written) in zip(parts, seen, strict=True))
    return attention, mlp


def _is_rms_norm(module: nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (hidden,) and getattr(module, "bias", None) is None
