"""LR, layer-wise: each half of a block refits its writer, so that it writes what the teacher's half would of the same.

    minimise over W'  sum over tokens |W' x + b - t|^2 + ridge * typical(G) * |W' - W|^2,     G = sum over tokens x xᵀ

x: what the pruned writer reads. t: what the teacher's attention writes for the same stream, or its MLP for what the
pruned block gives its own. The bias is fitted too where the layer has one; none is added, for plain models have no
place for it. Not covered: space `disp`, whose writers write a part of the stream, and quantised layers.
"""

import torch
from torch import Tensor, nn

from atp.criteria.ridge import Ridge
from atp.errors import UnsupportedModelError
from atp.passes import inputs_of
from atp.recovery.pairs import Pair
from atp.recovery.streams import Stream
from atp.structure.discovery import MLP, Attention


@torch.no_grad()
def refit_writers(pair: Pair, index: int, stream: Stream, ridge: float) -> None:
    """Refit the writers of the student's block in place, attention's first.

    Args:
        stream: the student's, before the block, a batch each.

    Raises:
        UnsupportedModelError: naming the writer that writes other features than the teacher's.
    """
    block = pair.blocks[index]
    _refit(pair, index, block.attention, stream, ridge)
    _refit(pair, index, block.mlp, stream, ridge)


def _refit(pair: Pair, index: int, half: Attention | MLP, stream: Stream, ridge: float) -> None:
    writer = _linear(pair.student.lm, half.writer.path)
    if writer is None:  # this half was pruned as a whole
        return
    teachers = pair.teacher.lm.get_submodule(half.writer.path)
    if writer.out_features != half.writer.out_features:
        raise UnsupportedModelError(
            f"{half.writer.path} writes {writer.out_features} of {half.writer.out_features} features, so the ridge "
            "regression of method 'lr' does not fit it: use 'br' or 'br+gp'"
        )
    regression = Ridge(writer.weight.float(), writer.bias, writer.bias is not None)
    for hidden in stream:
        x, target = _seen(pair, index, half, writer, teachers, hidden.to(pair.device))
        regression.add(x, target)
    change, shift = regression.change(ridge)
    writer.weight += change.to(writer.weight.dtype)
    if shift is not None:
        writer.bias.add_(shift.to(writer.bias.dtype))


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


def _linear(lm: nn.Module, path: str) -> nn.Linear | None:
    found = dict(lm.named_modules()).get(path)
    return found if isinstance(found, nn.Linear) else None
