"""Which attentions, MLPs and blocks a decision leaves, and where their tensors are afterwards."""

from collections.abc import Mapping

from torch import Tensor

from atp.structure.space import HIDDEN, KINDS, KV, MLP, SWITCHES, Space


class Remaining:
    """What is left of a model's blocks.

    Attributes:
        blocks: indices of the blocks that are left, in order, as they were.
        off: paths of attentions and MLPs that are gone, though their block is there.
    """

    def __init__(self, space: Space, masks: Mapping[str, Tensor]) -> None:
        switches = {linear.path: linear.switch.set for linear in space.linears if linear.switch is not None}
        blocks = space.structure.blocks
        gone = {
            half.path
            for block in blocks
            for half in (block.attention, block.mlp)
            if half.writer.path in switches and not masks[switches[half.writer.path]].any()
        }
        self.blocks = [b.index for b in blocks if not {b.attention.path, b.mlp.path} <= gone]
        left = [blocks[index] for index in self.blocks]
        self.off = {half.path for block in left for half in (block.attention, block.mlp) if half.path in gone}
        self._container = blocks[0].path.rsplit(".", 1)[0]
        self._index = {old: new for new, old in enumerate(self.blocks)}

    def new_name(self, name: str) -> str | None:
        """The state-dict name of a tensor in the smaller model; None where it is gone."""
        if any(name.startswith(f"{path}.") for path in self.off):
            return None
        if not name.startswith(f"{self._container}."):
            return name
        index, rest = name.removeprefix(f"{self._container}.").split(".", 1)
        new = self._index.get(int(index))
        return None if new is None else f"{self._container}.{new}.{rest}"


def kept_counts(space: Space, masks: Mapping[str, Tensor]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """How many groups each block that is left had and has, by kind of group inside a block; none of a half that is off.

    Where halves can be switched off, heads and channels are counted in any case.
    """
    remaining, sets = Remaining(space, masks), {(s.block, s.kind): s for s in space.sets}
    counted = {KV, MLP} if any(kind in SWITCHES for kind in space.kinds) else set()
    kinds = [kind for kind in KINDS if kind in counted or (kind in space.kinds and kind not in (HIDDEN, *SWITCHES))]
    full: dict[str, list[int]] = {kind: [] for kind in kinds}
    kept: dict[str, list[int]] = {kind: [] for kind in kinds}
    for block in (space.structure.blocks[index] for index in remaining.blocks):
        sizes = {KV: block.attention.num_kv_heads, MLP: block.mlp.intermediate_size}
        paths = {KV: block.attention.path, MLP: block.mlp.path}
        for kind in kinds:
            own = sets.get((block.index, kind))
            full[kind].append(sizes[kind] if own is None else own.size)
            left = full[kind][-1] if own is None else int(masks[own.name].sum())
            kept[kind].append(0 if paths.get(kind) in remaining.off else left)
    return full, kept
