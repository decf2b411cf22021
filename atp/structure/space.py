"""Spaces: which groups of coupled dimensions may be pruned, and exactly how many parameters each decision keeps.

`width`   (LLM-Pruner's and ATP's head and channel groups): per block, KV groups and MLP channels.
`values`  (as MoDeGPT's value-output pairs, arXiv 2408.09632): per block, dimensions of the values of each KV head, and
          MLP channels.
`disp`    (DISP-LLM, arXiv 2410.11988): per block, residual dimensions read by attention (S1), written by attention
          (S2), read by the MLP (S3), written by the MLP (S5), and MLP channels (S4).
`hidden`  (Minitron's embedding channels, arXiv 2407.14679): residual dimensions, one selection for the whole model.
`depth`   (as in LLM-Drop, arXiv 2406.15786): per block, attention and MLP as a whole; `uniform`: both together.

`width`, `hidden` and `depth` combine: `width+depth`.

A space is a table. Each *group set* is one vector of groups, such as the MLP channels of block 3; a decision gives
each set a 0/1 mask of shape `(size,)`, keyed by the set's name. Each linear layer says which sets own its rows and its
columns, and which switch it is under; it keeps kept rows x kept columns of its parameters, or none where the switch is
off, so counts are exact in every space.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from atp.structure.discovery import Structure

KV, VALUE, MLP = "kv", "value", "mlp"
ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT = "attention_in", "attention_out", "mlp_in", "mlp_out"
HIDDEN = "hidden"
WHOLE_BLOCK, WHOLE_ATTENTION, WHOLE_MLP = "whole_block", "whole_attention", "whole_mlp"
KINDS = (
    *(HIDDEN, WHOLE_BLOCK, WHOLE_ATTENTION, WHOLE_MLP),
    *(KV, VALUE, ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, MLP),
)
SWITCHES = (WHOLE_BLOCK, WHOLE_ATTENTION, WHOLE_MLP)
"""Kinds of set that hold one group, which is a half of a block or all of it."""


@dataclass(frozen=True)
class GroupSet:
    """Groups of one kind in one block, or in all. `counts`: kept counts it may take, ascending; the last is `size`."""

    name: str
    block: int | None
    kind: str
    size: int
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a linear layer. `owner[i]` is the group of feature i, `(features,)`; each group owns `units`."""

    set: str
    owner: Tensor
    units: int
    _there: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def owner_on(self, device: torch.device) -> Tensor:
        """`owner` on a device, brought there once."""
        if device not in self._there:
            self._there[device] = self.owner.to(device)
        return self._there[device]

    @cached_property
    def is_identity(self) -> bool:
        """Whether feature i is group i, so that a mask needs no expanding."""
        return self.units == 1 and bool((self.owner == torch.arange(len(self.owner))).all())


@dataclass(frozen=True, eq=False)
class PrunableLinear:
    """A linear layer with the sets that own its rows (outputs) and columns (inputs), where any do.

    `mask_rows`, `mask_cols`: whether the masked model multiplies that side. Rows whose consumer is masked anyway
    need no mask of their own; they are removed at export all the same.
    `switch`: the set that owns all of its outputs, whose mask a writer's outputs are multiplied by.
    """

    path: str
    out_features: int
    in_features: int
    rows: Axis | None = None
    cols: Axis | None = None
    mask_rows: bool = False
    mask_cols: bool = False
    switch: Axis | None = None
    mask_switch: bool = False


@dataclass(frozen=True, eq=False)
class SpanningNorm:
    """An RMS norm over pruned features: slicing rescales it by sqrt(H/H') and `source`'s rows by sqrt(H'/H)."""

    path: str
    source: str
    axis: Axis


@dataclass(frozen=True, eq=False)
class Space:
    """The table of one model in one space.

    `stream`: in `hidden`, the residual stream, which the embedding's outputs are masked along too.
    """

    name: str
    structure: Structure
    uniform: bool
    sets: tuple[GroupSet, ...]
    linears: tuple[PrunableLinear, ...]
    norms: tuple[SpanningNorm, ...] = field(default=())
    stream: Axis | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of group that this space really has, in order."""
        present = {s.kind for s in self.sets}
        return tuple(kind for kind in KINDS if kind in present)

    @property
    def prunable_parameters(self) -> int:
        """Weights of all decoder linears."""
        return self.structure.prunable_parameters

    def full(self) -> dict[str, Tensor]:
        """The decision that keeps everything."""
        return {s.name: torch.ones(s.size) for s in self.sets}

    def kept_parameters(self, kept: Tensor) -> Tensor:
        """Parameters kept when set i keeps `kept[i]` groups: shape `(sets,)` -> scalar, exact in float64.

        Differentiable in `kept`.
        """
        table = self._count_table
        counts = torch.cat([kept.double().cpu(), torch.ones(1, dtype=torch.float64)])
        rows, cols = counts[table.row_set] * table.row_units, counts[table.col_set] * table.col_units
        return (rows * cols * counts[table.switch]).sum()

    def kept_counts(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Kept groups of every set, shape `(sets,)`; differentiable in the masks."""
        return torch.stack([masks[s.name].double().sum() for s in self.sets]).cpu()

    def sparsity(self, masks: Mapping[str, Tensor]) -> float:
        """Share of prunable parameters that `masks` removes."""
        return 1.0 - self.kept_parameters(self.kept_counts(masks)).item() / self.prunable_parameters

    def in_effect(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same decision with nothing kept inside what is switched off."""
        effect = dict(masks)
        for linear in self.linears:
            if linear.switch is not None and not masks[linear.switch.set].any():
                inside = {axis.set for axis in (linear.rows, linear.cols) if axis is not None}
                effect |= {name: torch.zeros_like(masks[name]) for name in inside & self._in_blocks}
        return effect

    @cached_property
    def _in_blocks(self) -> set[str]:
        return {s.name for s in self.sets if s.block is not None}

    def kept_share(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of groups kept, per kind."""
        masks, shares = self.in_effect(masks), {}
        for kind in self.kinds:
            members = [masks[s.name] for s in self.sets if s.kind == kind]
            shares[kind] = sum(m.sum().item() for m in members) / sum(len(m) for m in members)
        return shares

    @cached_property
    def group_parameters(self) -> Tensor:
        """Parameters that one group of each set holds while everything else is kept, `(sets,)`, float64."""
        with torch.enable_grad():
            full = torch.tensor([float(s.size) for s in self.sets], dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(self.kept_parameters(full), full)[0]

    @cached_property
    def _count_table(self) -> "_CountTable":
        index = {s.name: i for i, s in enumerate(self.sets)}
        constant = len(self.sets)
        rows = [_side(linear.rows, linear.out_features, index, constant) for linear in self.linears]
        cols = [_side(linear.cols, linear.in_features, index, constant) for linear in self.linears]
        return _CountTable(
            row_set=torch.tensor([r[0] for r in rows]),
            row_units=torch.tensor([r[1] for r in rows], dtype=torch.float64),
            col_set=torch.tensor([c[0] for c in cols]),
            col_units=torch.tensor([c[1] for c in cols], dtype=torch.float64),
            switch=torch.tensor([constant if one.switch is None else index[one.switch.set] for one in self.linears]),
        )


@dataclass(frozen=True)
class _CountTable:
    row_set: Tensor
    row_units: Tensor
    col_set: Tensor
    col_units: Tensor
    switch: Tensor


def _side(axis: Axis | None, features: int, index: Mapping[str, int], constant: int) -> tuple[int, int]:
    return (constant, features) if axis is None else (index[axis.set], axis.units)
