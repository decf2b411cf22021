"""Teacher and student side by side: which block of one is which of the other, and how both are called."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from atp.errors import UnsupportedModelError
from atp.passes import block_calls, first_output, forwards_replaced
from atp.structure.discovery import Block, discover
from atp.structure.live import causal_lm


@dataclass(frozen=True, eq=False)
class Half:
    """One model: its blocks, and what each is called with beside hidden states, by how many rows there are.

    Rows are windows of the same length, without padding, so that nothing else tells one call from another.
    `in_tuple`: whether blocks give their hidden states in a tuple.
    """

    lm: PreTrainedModel
    blocks: Sequence[nn.Module]
    calls: Mapping[int, Sequence[tuple[tuple[Any, ...], dict[str, Any]]]]
    in_tuple: bool

    def opening(self, ids: Tensor) -> Tensor:
        """Hidden states before the first block, `(rows, tokens, hidden)`, on the CPU."""
        found, _ = block_calls(self.blocks[:1], partial(_forward, self.lm), [ids])
        return found[0].hidden

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """One block."""
        args, kwargs = self.arguments(index, hidden)
        return first_output(self.blocks[index], hidden, args, kwargs)

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """`(tokens, vocabulary)`, of some tokens of one row: their `hidden`, after the last block, and their ids."""

        def instead(_index: int, _own: Any) -> Any:
            return lambda *_args, **_kwargs: (hidden,) if self.in_tuple else hidden

        with forwards_replaced(self.blocks, instead):
            return _forward(self.lm, ids).logits[0]

    def arguments(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block is called with beside `hidden`, where that is and of its dtype."""

        def like(tensor: Tensor) -> Tensor:
            return tensor.to(hidden.device, hidden.dtype if tensor.is_floating_point() else tensor.dtype)

        return tree_map_only(Tensor, like, self.calls[len(hidden)][index])


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, a student, and the teacher's blocks as discovery found them; paths in the student are the same.

    `device`: where blocks compute; they lie on the CPU otherwise.
    """

    teacher: Half
    student: Half
    blocks: tuple[Block, ...]
    device: str

    @contextmanager
    def placed(self, *indices: int) -> Iterator[None]:
        """Within it, these blocks of both are where they compute."""
        modules = [half.blocks[index] for half in (self.teacher, self.student) for index in indices]
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")


@torch.no_grad()
def pair(teacher: nn.Module, student: PreTrainedModel, batches: Sequence[Tensor], device: str) -> Pair:
    """Both models, on the CPU, in evaluation mode.

    Args:
        batches: of ids, `(rows, tokens)`; as many rows as there will be, of each number one.

    Raises:
        UnsupportedModelError: where their streams cannot be compared.
    """
    lm = causal_lm(teacher)
    blocks = discover(lm).blocks
    for what in ("hidden_size", "num_hidden_layers", "vocab_size"):
        theirs, ours = getattr(lm.config, what), getattr(student.config, what)
        if theirs != ours:
            raise UnsupportedModelError(
                f"the teacher's {what} is {theirs} and the pruned model's {ours}, so their streams cannot be compared: "
                "recovery is for pruning that leaves these alone (not space 'hidden', nor whole blocks with uniform)"
            )
    return Pair(_half(lm, blocks, batches), _half(student, blocks, batches), blocks, device)


def _half(lm: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Half:
    lm.eval()
    modules = [lm.get_submodule(block.path) for block in blocks]
    found = {len(ids): block_calls(modules, partial(_forward, lm), [ids])[0][0] for ids in batches}
    any_calls = next(iter(found.values()))
    args, kwargs = any_calls.of_block[0]
    in_tuple = isinstance(modules[0](any_calls.hidden, *args, **kwargs), tuple)
    return Half(lm, modules, {rows: calls.of_block for rows, calls in found.items()}, in_tuple)


def _forward(lm: PreTrainedModel, ids: Tensor) -> Any:
    return lm(input_ids=ids, use_cache=False)
