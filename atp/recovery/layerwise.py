"""LR, layer-wise: each half of a block refits its writer, so that it writes what the teacher's half would of the same.

    minimise over W'  sum over tokens |W' x + b - t|^2 + ridge * typical(G) * |W' - W|^2,     G = sum over tokens x xᵀ

x: what the pruned writer reads. t: what the teacher's attention writes for the same stream, or its MLP for what the
pruned block gives its own. The bias is fitted too where the layer has one. Not covered: space `disp`, whose writers
write a part of the stream, and quantised layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atp.criteria.ridge import Ridge
from atp.errors import UnsupportedModelError
from atp.passes import as_given, beside, giving, inputs_of, outputs_of
from atp.recovery.pairs import Pair
from atp.recovery.streams import Stream
from atp.structure.discovery import MLP, Attention


@torch.no_grad()
def refit_writers(pair: Pair, index: int, stream: Stream, ridge: float, folder: Path) -> Stream:
    """Refit the writers of the student's block in place, attention's first.

    What a writer reads is computed once, and held until the block is done.

    Args:
        stream: the student's, before the block.
        folder: for temporary files.

    Returns:
        The stream after the block.

    Raises:
        UnsupportedModelError: naming the writer that writes other features than the teacher's.
    """
    block = pair.blocks[index]
    written: list[_Written] = []
    for half in (block.attention, block.mlp):
        writer = _writer(pair, half)
        if writer is not None:  # else this half was pruned as a whole
            written.append(_refit(pair, index, half, writer, stream, written, ridge, folder))
    passed = Stream(stream.nbytes, folder)
    for batch in stream.indices:
        hidden = stream[batch].to(pair.device)
        with _given(written, batch, pair.device):
            passed[batch] = pair.student.run(index, hidden)
    return passed


@dataclass(frozen=True, eq=False)
class _Written:
    """What a half of the student's block gives: its module, what its writer reads, and how many things are beside."""

    module: nn.Module
    writer: nn.Linear
    reads: Stream
    beside: int | None


@contextmanager
def _given(halves: Sequence[_Written], batch: int, device: str) -> Iterator[None]:
    """Within it these halves compute nothing but their writers' products."""
    with ExitStack() as stack:
        for half in halves:
            output = as_given(half.writer(half.reads[batch].to(device)), half.beside)
            stack.enter_context(giving(half.module, output))
        yield


def _refit(
    pair: Pair,
    index: int,
    half: Attention | MLP,
    writer: nn.Linear,
    stream: Stream,
    before: Sequence[_Written],
    ridge: float,
    folder: Path,
) -> _Written:
    """`before`: what comes before this half in its block."""
    teachers = pair.teacher.lm.get_submodule(half.writer.path)
    module = pair.student.lm.get_submodule(half.path)
    first = stream[stream.indices[0]].to(pair.device)
    with outputs_of(module) as outputs:
        pair.student.run(index, first)
    regression = Ridge(writer.weight.float(), writer.bias, writer.bias is not None)
    reads = Stream(stream.nbytes // first.shape[-1] * writer.in_features, folder)
    for batch in stream.indices:
        hidden = stream[batch].to(pair.device)
        with _given(before, batch, pair.device):
            x, target = _seen(pair, index, half, writer, teachers, hidden)
        regression.add(x, target)
        reads[batch] = x
    change, shift = regression.change(ridge)
    writer.weight += change.to(writer.weight.dtype)
    if shift is not None:
        writer.bias.add_(shift.to(writer.bias.dtype))
    return _Written(module, writer, reads, beside(outputs[0]))


def _seen(
    pair: Pair, index: int, half: Attention | MLP, writer: nn.Module, teachers: nn.Module, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """What the writer reads, and what the teacher's writes."""
    student, teacher = pair.student, pair.teacher
    if isinstance(half, Attention):
        x = inputs_of(writer, student.blocks[index], hidden, *student.arguments(index, hidden))
        return x, teachers(inputs_of(teachers, teacher.blocks[index], hidden, *teacher.arguments(index, hidden)))
    mlp = student.lm.get_submodule(half.path)
    entering = inputs_of(mlp, student.blocks[index], hidden, *student.arguments(index, hidden))
    x = inputs_of(writer, mlp, entering)
    return x, teachers(inputs_of(teachers, teacher.lm.get_submodule(half.path), entering))


def _writer(pair: Pair, half: Attention | MLP) -> nn.Linear | None:
    found = dict(pair.student.lm.named_modules()).get(half.writer.path)
    if not isinstance(found, nn.Linear):
        return None
    if found.out_features != half.writer.out_features:
        raise UnsupportedModelError(
            f"{half.writer.path} writes {found.out_features} of {half.writer.out_features} features, so the ridge "
            "regression of method 'lr' does not fit it: use 'br' or 'br+gp'"
        )
    return found
