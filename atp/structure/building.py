"""Building spaces: which axis of which linear layer belongs to which group set, and what counts each set may keep."""

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from atp.config import space_parts
from atp.errors import ConfigError, UnsupportedModelError
from atp.structure.discovery import Attention, Block, Linear, Structure
from atp.structure.space import (
    ATTENTION_IN,
    ATTENTION_OUT,
    HIDDEN,
    KINDS,
    KV,
    MLP,
    MLP_IN,
    MLP_OUT,
    VALUE,
    WHOLE_ATTENTION,
    WHOLE_BLOCK,
    WHOLE_MLP,
    Axis,
    GroupSet,
    PrunableLinear,
    Space,
    SpanningNorm,
)

_WIDE = 2048


def build_space(structure: Structure, name: str, uniform: bool = False, round_to: int | None = None) -> Space:
    """The table of groups of `structure` in space `name`.

    Args:
        name: as `ATPConfig.space`.
        uniform: all blocks get the same widths, and only widths that the family's own config can express; in `depth`
            whole blocks go.
        round_to: kept counts of dimensions and channels are multiples of this; `None` takes `default_round_to`.
            KV groups are whole heads already and are not rounded further.

    Raises:
        ConfigError: where `name` is unknown, or `round_to` is larger than the widths it should divide.
        UnsupportedModelError: where `uniform` is asked of a model whose blocks differ, or `hidden` of one whose
            residual stream cannot be cut.
    """
    parts = space_parts(name)
    if uniform and not structure.plain_kv_heads:
        raise UnsupportedModelError(
            f"uniform=True: the {structure.model_type} config cannot express equal widths for these blocks: "
            "use uniform=False"
        )
    axes = _Axes(structure, parts, uniform, round_to)
    linears: list[PrunableLinear] = []
    norms: list[SpanningNorm] = []
    for block in structure.blocks:
        of_block = axes.of(block)
        linears += _disp_block(block, of_block) if "disp" in parts else _block(block, of_block)
        norms += _norms(block, of_block) if "width" in parts else []
    stream = axes.stream if "hidden" in parts else None
    return Space("+".join(parts), structure, uniform, tuple(axes.sets()), tuple(linears), tuple(norms), stream)


def default_round_to(size: int) -> int:
    """Multiples that matrix hardware likes, by width alone, so that every device gives the same model.

    128 from 8,192 on, 64 from 2,048 on: rounding a narrow model as much would cost more quality than it gains speed. 16
    from 512 on: rows whose vectors of 16 bytes a GPU can read as such, and which Triton takes for that; 8 from 128 on
    (the values of few KV heads), which are still such vectors in 16 bits; else 1.
    """
    steps = ((8192, 128), (_WIDE, 64), (512, 16), (128, 8))
    return next((step for least, step in steps if size >= least), 1)


class _Axes:
    """Axes of a whole model, making each group set the first time it is asked for."""

    def __init__(self, structure: Structure, parts: tuple[str, ...], uniform: bool, round_to: int | None) -> None:
        self.structure, self.parts, self.uniform, self.round_to = structure, parts, uniform, round_to
        self._sets: dict[str, GroupSet] = {}
        self._made: dict[str, list[Axis]] = {}

    @cached_property
    def stream(self) -> Axis:
        """The residual stream of the whole model."""
        size, stream = self.structure.hidden_size, self.structure.stream
        queries, kv_heads = self.structure.blocks[0].attention.queries_per_group, self.structure.plain_kv_heads
        if stream.refusal:
            raise UnsupportedModelError(f"space='hidden': {stream.refusal}")
        step = stream.step
        if "width" in self.parts and step > 1:  # of whatever heads are left, where the result is plain
            step = math.lcm(step, *(n * queries for n in kv_heads))
        if self.round_to is None and step > 1 and size < _WIDE:  # both would leave few widths
            counts = tuple(range(step, size + 1, step))
        else:
            counts = tuple(n for n in self.multiples(HIDDEN, size, "the model") if n % step == 0)
        return self.axis(GroupSet(HIDDEN, None, HIDDEN, size, counts), torch.arange(size), 1)

    def of(self, block: Block) -> "_BlockAxes":
        """Those of one block."""
        return _BlockAxes(self, block)

    def axis(self, group_set: GroupSet, owner: Tensor, units: int) -> Axis:
        """The axis of these owners, one for all layers that have it; makes the set known."""
        self._sets.setdefault(group_set.name, group_set)
        alike = self._made.setdefault(group_set.name, [])
        found = next((axis for axis in alike if torch.equal(axis.owner, owner)), None)
        if found is None:
            found = Axis(group_set.name, owner, units)
            alike.append(found)
        return found

    def sets(self) -> list[GroupSet]:
        """All sets, those of the whole model first, then block by block in the order of `KINDS`."""
        return sorted(self._sets.values(), key=lambda s: (-1 if s.block is None else s.block, KINDS.index(s.kind)))

    def multiples(self, kind: str, size: int, where: str) -> tuple[int, ...]:
        """Kept counts that rounding allows."""
        step = self.round_to or default_round_to(size)
        if step > size:
            raise ConfigError(f"round_to={step} is larger than the {size} {kind} groups of {where}: lower it")
        return tuple(sorted({*range(step, size + 1, step), size}))


class _BlockAxes:
    """Axes of one block."""

    def __init__(self, model: _Axes, block: Block) -> None:
        self._model, self._block = model, block

    def has(self, part: str) -> bool:
        """Whether the space is or joins `part`."""
        return part in self._model.parts

    @property
    def stream(self) -> Axis | None:
        """The residual stream, where one selection is made for the whole model."""
        return self._model.stream if self.has("hidden") else None

    def residual(self, kind: str) -> Axis:
        """Residual dimensions as one half of this block reads or writes them."""
        size = self._model.structure.hidden_size
        return self._axis(kind, size, self._multiples(kind, size), torch.arange(size), 1)

    def switch(self, kind: str, linear: Linear) -> Axis | None:
        """All outputs of `linear`, under the switch of its half. The first block stays: a model has one at least."""
        if not self.has("depth"):
            return None
        counts = (1,) if self._block.index == 0 else (0, 1)
        owner = torch.zeros(linear.out_features, dtype=torch.long)
        return self._axis(WHOLE_BLOCK if self._model.uniform else kind, 1, counts, owner, linear.out_features)

    def channels(self, times: int = 1) -> Axis:
        """Channels of the MLP, `times` over."""
        size = self._block.mlp.intermediate_size
        owner = torch.arange(size).repeat(times)
        return self._axis(MLP, size, self._multiples(MLP, size), owner, times)

    def heads(self, linear: Linear) -> Axis:
        """Rows of a query/key/value projection, or columns of the attention writer (`packs` empty)."""
        attention = self._block.attention
        size = attention.num_kv_heads
        counts = self._model.structure.plain_kv_heads if self._model.uniform else tuple(range(1, size + 1))
        owner = _head_owner(attention, linear)
        return self._axis(KV, size, counts, owner, len(owner) // size)

    def values(self, linear: Linear) -> Axis | None:
        """Dimensions of values: rows of their projection, or columns of the attention writer; None of other layers.

        Raises:
            UnsupportedModelError: where values are no layer's own outputs, or go through a norm.
        """
        attention = self._block.attention
        if "v" in linear.packs and (len(linear.packs) > 1 or attention.norms_values):
            why = "packs values with others" if len(linear.packs) > 1 else "is followed by a norm"
            raise UnsupportedModelError(
                f"{linear.path} {why}: space 'values' needs a layer whose outputs are the values"
            )
        if linear.packs and linear.packs != ("v",):
            return None
        size = attention.num_kv_heads * attention.head_dim
        owner = torch.arange(size)
        if not linear.packs:  # a column a query head and dimension
            heads = owner.reshape(attention.num_kv_heads, 1, -1)
            owner = heads.expand(-1, attention.queries_per_group, -1).flatten()
        return self._axis(VALUE, size, self._multiples(VALUE, size), owner, len(owner) // size)

    def attention(self, linear: Linear) -> Axis | None:
        """Of `linear`'s rows, or of the attention writer's columns: heads, value dimensions, or nothing."""
        if self.has("width"):
            return self.heads(linear)
        return self.values(linear) if self.has("values") else None

    def _axis(self, kind: str, size: int, counts: tuple[int, ...], owner: Tensor, units: int) -> Axis:
        index = self._block.index
        return self._model.axis(GroupSet(f"{index}.{kind}", index, kind, size, counts), owner, units)

    def _multiples(self, kind: str, size: int) -> tuple[int, ...]:
        return self._model.multiples(kind, size, f"block {self._block.index}")


def _head_owner(attention: Attention, linear: Linear) -> Tensor:
    """KV group of every row of `linear` (or of every column of the writer)."""
    groups, head_dim = attention.num_kv_heads, attention.head_dim
    per_group = {"q": attention.queries_per_group * head_dim, "k": head_dim, "v": head_dim}
    packs = linear.packs or ("q",)
    if linear.interleaved:
        return torch.arange(groups).repeat_interleave(sum(per_group[part] for part in packs))
    return torch.cat([torch.arange(groups).repeat_interleave(per_group[part]) for part in packs])


def _block(block: Block, axes: _BlockAxes) -> Iterable[PrunableLinear]:
    """Any of `width`, `hidden` and `depth`, or `values`."""
    attention, mlp = block.attention, block.mlp
    normed = {norm.source for norm in attention.spanning_norms}
    width, stream = axes.has("width"), axes.stream
    channels = width or axes.has("values")
    for reader in attention.readers:
        yield PrunableLinear(
            reader.path,
            reader.out_features,
            reader.in_features,
            rows=axes.attention(reader),
            cols=stream,
            mask_rows=width and bool(normed & set(reader.packs)),
            switch=axes.switch(WHOLE_ATTENTION, reader),
        )
    yield _writer(attention.writer, axes, axes.attention(attention.writer), WHOLE_ATTENTION)
    for reader in mlp.readers:
        yield PrunableLinear(
            reader.path,
            reader.out_features,
            reader.in_features,
            rows=axes.channels(len(reader.packs)) if channels else None,
            cols=stream,
            switch=axes.switch(WHOLE_MLP, reader),
        )
    yield _writer(mlp.writer, axes, axes.channels() if channels else None, WHOLE_MLP)


def _writer(writer: Linear, axes: _BlockAxes, cols: Axis | None, half: str) -> PrunableLinear:
    rows, switch = axes.stream, axes.switch(half, writer)
    return PrunableLinear(
        writer.path,
        writer.out_features,
        writer.in_features,
        rows,
        cols,
        mask_rows=rows is not None,
        mask_cols=cols is not None,
        switch=switch,
        mask_switch=switch is not None,
    )


def _disp_block(block: Block, axes: _BlockAxes) -> list[PrunableLinear]:
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


def _norms(block: Block, axes: _BlockAxes) -> list[SpanningNorm]:
    by_part = {part: reader for reader in block.attention.readers for part in reader.packs}
    return [
        SpanningNorm(norm.path, by_part[norm.source].path, axes.heads(by_part[norm.source]))
        for norm in block.attention.spanning_norms
    ]
