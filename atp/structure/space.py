"""Spaces: which groups of coupled dimensions may be pruned, and exactly how many parameters each decision keeps.

`width`  (LLM-Pruner's and ATP's head and channel groups): per block, KV groups and MLP channels.
`disp`   (DISP-LLM, arXiv 2410.11988): per block, residual dimensions read by attention (S1), written by attention
         (S2), read by the MLP (S3), written by the MLP (S5), and MLP channels (S4).

A space is a table. Each *group set* is one vector of groups of one block, such as the MLP channels of block 3; a
decision gives each set a 0/1 mask of shape `(size,)`, keyed by the set's name. Each linear layer says which sets own
its rows and its columns; its kept parameters are kept rows x kept columns, so counts are exact in either space.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from atp.errors import ConfigError, UnsupportedModelError
from atp.structure.discovery import Attention, Block, Linear, Structure

KV, MLP = "kv", "mlp"
ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT = "attention_in", "attention_out", "mlp_in", "mlp_out"
KINDS = {"width": (KV, MLP), "disp": (ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, MLP)}


@dataclass(frozen=True)
class GroupSet:
    """Groups of one kind in one block. `counts`: the kept counts it may take, ascending; the last is `size`."""

    name: str
    block: int
    kind: str
    size: int
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a linear layer. `owner[i]` is the group of feature i, `(features,)`; each group owns `units`."""

    set: str
    owner: Tensor
    units: int

    @cached_property
    def is_identity(self) -> bool:
        """Whether feature i is group i, so that a mask needs no expanding."""
        return self.units == 1 and bool((self.owner == torch.arange(len(self.owner))).all())


@dataclass(frozen=True, eq=False)
class PrunableLinear:
    """A linear layer with the sets that own its rows (outputs) and columns (inputs), where any do.

    `mask_rows`, `mask_cols`: whether the masked model multiplies that side. Rows whose consumer is masked anyway
    need no mask of their own; they are removed at export all the same.
    """

    path: str
    out_features: int
    in_features: int
    rows: Axis | None = None
    cols: Axis | None = None
    mask_rows: bool = False
    mask_cols: bool = False


@dataclass(frozen=True, eq=False)
class SpanningNorm:
    """An RMS norm over pruned features: slicing rescales it by sqrt(H/H') and `source`'s rows by sqrt(H'/H)."""

    path: str
    source: str
    axis: Axis


@dataclass(frozen=True, eq=False)
class Space:
    """The table of one model in one space."""

    name: str
    structure: Structure
    uniform: bool
    sets: tuple[GroupSet, ...]
    linears: tuple[PrunableLinear, ...]
    norms: tuple[SpanningNorm, ...] = field(default=())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of group that this space really has, in order."""
        present = {s.kind for s in self.sets}
        return tuple(kind for kind in KINDS[self.name] if kind in present)

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
        return ((counts[table.row_set] * table.row_units) * (counts[table.col_set] * table.col_units)).sum()

    def kept_counts(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Kept groups of every set, shape `(sets,)`; differentiable in the masks."""
        return torch.stack([masks[s.name].double().sum() for s in self.sets]).cpu()

    def sparsity(self, masks: Mapping[str, Tensor]) -> float:
        """Share of prunable parameters that `masks` removes."""
        return 1.0 - self.kept_parameters(self.kept_counts(masks)).item() / self.prunable_parameters

    def kept_share(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of groups kept, per kind."""
        shares = {}
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
        )


@dataclass(frozen=True)
class _CountTable:
    row_set: Tensor
    row_units: Tensor
    col_set: Tensor
    col_units: Tensor


def _side(axis: Axis | None, features: int, index: Mapping[str, int], constant: int) -> tuple[int, int]:
    return (constant, features) if axis is None else (index[axis.set], axis.units)


def build_space(structure: Structure, name: str, uniform: bool = False, round_to: int | None = None) -> Space:
    """The table of groups of `structure` in space `name`.

    Args:
        uniform: all blocks get the same widths, and only widths that the family's own config can express.
        round_to: kept counts of dimensions and channels are multiples of this; `None` takes `default_round_to`.
            KV groups are whole heads already and are not rounded further.

    Raises:
        ConfigError: where `round_to` is larger than the widths it should divide.
        UnsupportedModelError: where `uniform` is asked of a model whose blocks differ.
    """
    if name not in KINDS:
        raise ConfigError(f"space={name!r} is unknown: it must be one of {', '.join(KINDS)}")
    if uniform and not structure.plain_kv_heads:
        raise UnsupportedModelError(
            f"uniform=True: the {structure.model_type} config cannot express equal widths for these blocks: "
            "use uniform=False"
        )
    build = {"width": _width_block, "disp": _disp_block}[name]
    sets: list[GroupSet] = []
    linears: list[PrunableLinear] = []
    norms: list[SpanningNorm] = []
    for block in structure.blocks:
        axes = _Axes(structure, block, uniform, round_to)
        linears += build(block, axes)
        norms += _norms(block, axes) if name == "width" else []
        sets += [axes.sets[kind] for kind in KINDS[name] if kind in axes.sets]
    return Space(name, structure, uniform, tuple(sets), tuple(linears), tuple(norms))


def default_round_to(size: int) -> int:
    """Multiples that matrix hardware likes, by width alone, so that every device gives the same model.

    128 from 8,192 on, 64 from 2,048 on, else 1: rounding a narrow model costs more quality than it gains speed.
    """
    if size >= 8192:
        return 128
    return 64 if size >= 2048 else 1


class _Axes:
    """The axes of one block, making each group set the first time it is asked for."""

    def __init__(self, structure: Structure, block: Block, uniform: bool, round_to: int | None) -> None:
        self.sets: dict[str, GroupSet] = {}
        self._structure, self._block = structure, block
        self._uniform, self._round_to = uniform, round_to

    def residual(self, kind: str) -> Axis:
        size = self._structure.hidden_size
        return Axis(self._set(kind, size, self._multiples(kind, size)), torch.arange(size), 1)

    def channels(self, times: int = 1) -> Axis:
        size = self._block.mlp.intermediate_size
        owner = torch.arange(size).repeat(times)
        return Axis(self._set(MLP, size, self._multiples(MLP, size)), owner, times)

    def heads(self, linear: Linear) -> Axis:
        """Rows of a query/key/value projection, or columns of the attention writer (`packs` empty)."""
        attention = self._block.attention
        size = attention.num_kv_heads
        plain = self._structure.plain_kv_heads
        counts = plain if self._uniform else tuple(range(1, size + 1))
        owner = _head_owner(attention, linear)
        return Axis(self._set(KV, size, counts), owner, len(owner) // size)

    def _set(self, kind: str, size: int, counts: tuple[int, ...]) -> str:
        name = f"{self._block.index}.{kind}"
        self.sets.setdefault(kind, GroupSet(name, self._block.index, kind, size, counts))
        return name

    def _multiples(self, kind: str, size: int) -> tuple[int, ...]:
        step = self._round_to or default_round_to(size)
        if step > size:
            raise ConfigError(
                f"round_to={step} is larger than the {size} {kind} groups of block {self._block.index}: lower it"
            )
        return tuple(sorted({*range(step, size + 1, step), size}))


def _head_owner(attention: Attention, linear: Linear) -> Tensor:
    """KV group of every row of `linear` (or of every column of the writer)."""
    groups, head_dim = attention.num_kv_heads, attention.head_dim
    per_group = {"q": attention.queries_per_group * head_dim, "k": head_dim, "v": head_dim}
    packs = linear.packs or ("q",)
    if linear.interleaved:
        return torch.arange(groups).repeat_interleave(sum(per_group[part] for part in packs))
    return torch.cat([torch.arange(groups).repeat_interleave(per_group[part]) for part in packs])


def _width_block(block: Block, axes: _Axes) -> list[PrunableLinear]:
    attention, mlp = block.attention, block.mlp
    normed = {norm.source for norm in attention.spanning_norms}
    return [
        *(
            PrunableLinear(
                r.path, r.out_features, r.in_features, rows=axes.heads(r), mask_rows=bool(normed & set(r.packs))
            )
            for r in attention.readers
        ),
        _linear(attention.writer, cols=axes.heads(attention.writer)),
        *(PrunableLinear(r.path, r.out_features, r.in_features, rows=axes.channels(len(r.packs))) for r in mlp.readers),
        _linear(mlp.writer, cols=axes.channels()),
    ]


def _disp_block(block: Block, axes: _Axes) -> list[PrunableLinear]:
    attention, mlp = block.attention, block.mlp
    mlp_writer = PrunableLinear(
        mlp.writer.path,
        mlp.writer.out_features,
        mlp.writer.in_features,
        rows=axes.residual(MLP_OUT),
        cols=axes.channels(),
        mask_rows=True,
        mask_cols=True,
    )
    return [
        *(_linear(r, cols=axes.residual(ATTENTION_IN)) for r in attention.readers),
        PrunableLinear(
            attention.writer.path,
            attention.writer.out_features,
            attention.writer.in_features,
            rows=axes.residual(ATTENTION_OUT),
            mask_rows=True,
        ),
        *(
            PrunableLinear(
                r.path,
                r.out_features,
                r.in_features,
                rows=axes.channels(len(r.packs)),
                cols=axes.residual(MLP_IN),
                mask_cols=True,
            )
            for r in mlp.readers
        ),
        mlp_writer,
    ]


def _linear(linear: Linear, cols: Axis) -> PrunableLinear:
    return PrunableLinear(linear.path, linear.out_features, linear.in_features, cols=cols, mask_cols=True)


def _norms(block: Block, axes: _Axes) -> list[SpanningNorm]:
    by_part = {part: reader for reader in block.attention.readers for part in reader.packs}
    return [
        SpanningNorm(norm.path, by_part[norm.source].path, axes.heads(by_part[norm.source]))
        for norm in block.attention.spanning_norms
    ]
