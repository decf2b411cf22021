"""Ranking: raw scores of any scale -> comparable values that `budget.project` can cut at one level.

`block`   each group's place within its own set, so that every block loses the same share (the fair two-stage
          rival: activation-weighted, uniform per block, first and last blocks left whole), of few large groups rather
          less than more: Wanda's, FLAP's and LLM-Pruner's authors round the number of heads to go down; attentions and
          MLPs as a whole, each a set of one, among themselves, by score per parameter.
`global`  the score per parameter that the group holds, over the whole model; with a tilt, times exp(tilt * x), x from
          -1 in the first block to 1 in the last; of groups inside attention, times a factor of their own; with a floor,
          the best groups of every set are pruned last.
`standard`  scores as they come, which are to be z-scores: of features where the criterion has them (`scores`), else of
          groups within their set (`standardised`), compared over the whole model (FLAP, arXiv 2312.11983, "AL-AM").
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from atp.structure.space import KV, SWITCHES, VALUE, GroupSet, Space

SUITABLE = {"surgeon": "global", "flap": "standard"}
"""The ranking that suits a criterion, where it is not `"block"`: `surgeon` is in nats of loss whatever the block, and
FLAP's authors standardise. Other scores mean nothing across blocks: ranked globally they remove whole blocks."""


def suitable_protect(criterion: str, blocks: int) -> tuple[int, int]:
    """How many first and last blocks to protect: none where the criterion sees for itself what they are worth."""
    return (0, 0) if criterion == "surgeon" else default_protect(blocks)


def rank(
    scores: Mapping[str, Tensor],
    space: Space,
    how: str,
    protect: tuple[int, int],
    tilt: float = 0.0,
    floor: float = 0.0,
    attention: float = 0.0,
) -> dict[str, Tensor]:
    """Values in (0, 1], `(size,)` per set; what is protected lies in (1, 2] and so is pruned last.

    Args:
        how: `"block"`, `"global"` or `"standard"`.
        protect: numbers of first and last blocks to protect.
        tilt: of `"global"` towards late blocks.
        floor: of `"global"`: this share of every set, its best groups, is protected.
        attention: of `"global"`: scores of KV groups and value dimensions count exp(attention) times.
    """
    blocks = len(space.structure.blocks)
    first, last = protect
    if how == "block":
        ranked = {s.name: _shares_below(scores[s.name]) for s in space.sets} | _switches(scores, space, _percentiles)
    else:
        ranked = _over_all(_per_parameter(scores, space, tilt, attention) if how == "global" else scores)
    for s in space.sets:
        if s.block is not None and (s.block < first or s.block >= blocks - last):
            ranked[s.name] = 1.0 + ranked[s.name]
        elif how == "global" and s.kind not in SWITCHES:
            best = ranked[s.name].topk(round(floor * s.size)).indices
            ranked[s.name][best] += 1.0
    return ranked


def default_protect(blocks: int) -> tuple[int, int]:
    """First tenth and last thirtieth of the blocks: 3 and 1 of 30. Sparing them matters more than the criterion."""
    return round(blocks / 10), round(blocks / 30)


def starting_logits(ranked: Mapping[str, Tensor], decision: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Graded logits in the order of `ranked` whose zero separates as many groups as `decision` prunes.

    Args:
        scale: standard deviation of the logits of unprotected groups.
    """
    flat = torch.cat([ranked[name] for name in decision]).sort().values
    pruned = sum(int((mask == 0).sum()) for mask in decision.values())
    edge = flat[max(pruned - 1, 0) : pruned + 1].mean()
    spread = 12**0.5  # the standard deviation of a uniform variable on (0, 1) is 1 / sqrt(12)
    return {name: (value - edge) * spread * scale for name, value in ranked.items()}


def _percentiles(values: Tensor) -> Tensor:
    return (_places(values) + 0.5) / len(values)


def _shares_below(values: Tensor) -> Tensor:
    """The share of a set that is gone once a group is: pruned up to a share, a set loses no more than that."""
    return (_places(values) + 1.0) / len(values)


def _places(values: Tensor) -> Tensor:
    """Of each value among all, from 0 for the least."""
    return torch.argsort(torch.argsort(values, stable=True), stable=True)


def _over_all(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = _percentiles(torch.cat(list(values.values())))
    return dict(zip(values, joined.split([len(v) for v in values.values()]), strict=True))


def _per_parameter(scores: Mapping[str, Tensor], space: Space, tilt: float, attention: float) -> dict[str, Tensor]:
    last = max(len(space.structure.blocks) - 1, 1)

    def favour(s: GroupSet) -> float:
        depth = 0.0 if s.block is None else 2 * s.block / last - 1
        return math.exp(tilt * depth + attention * (s.kind in (KV, VALUE)))

    held = space.group_parameters.tolist()
    return {s.name: scores[s.name] / each * favour(s) for s, each in zip(space.sets, held, strict=True)}


def standardised(scores: Mapping[str, Tensor], space: Space, by_group: bool = True) -> dict[str, Tensor]:
    """Scores for `standard`: mean 0 and standard deviation 1 within each set, where they are not so by feature.

    Args:
        by_group: whether they are raw scores of groups; attentions and MLPs as a whole are raw in any case.
    """
    values = {s.name: z_scores(scores[s.name]) if by_group else scores[s.name] for s in space.sets}
    return values | _switches(scores, space, z_scores)


def z_scores(values: Tensor) -> Tensor:
    """`values` less their mean, over their standard deviation; zeros where all are alike."""
    centred = values.double() - values.double().mean()
    deviation = centred.square().mean().sqrt()
    alike = deviation <= torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(alike, 0.0, centred / deviation).to(values.dtype)


def _switches(scores: Mapping[str, Tensor], space: Space, compared: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Attentions, MLPs and blocks, each a set of one, `compared` with one another per parameter that they hold."""
    held = dict(zip((s.name for s in space.sets), space.group_parameters.tolist(), strict=True))
    names = [s.name for s in space.sets if s.kind in SWITCHES]
    if not names:
        return {}
    values = compared(torch.cat([scores[name] / held[name] for name in names]))
    return dict(zip(names, values.split(1), strict=True))
