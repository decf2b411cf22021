"""Criteria: one score per group, higher is more worth keeping.

activation  sum over a group's weights of |W_ij| * ||x_j||  (Wanda, arXiv 2306.11695, summed over the group)
flap        sum over a group's weights of W_ij^2 * var(x_j)  (FLAP, arXiv 2312.11983: what a bias cannot make up for);
            of attention its square, where features are standardised, as in the authors' code
surgeon     what the loss rises by when groups go one after the other and the rest of the layer is refitted (optimal
            brain surgeon with K-FAC curvature, see `surgeon.py`); where nothing can make up for it, for written
            dimensions mean(d^2) mean(y^2) / 2, for attentions and MLPs as a whole tr(mean(d dᵀ) mean(y yᵀ)) / 2, for
            dimensions of the whole stream the sum of what each reader loses
magnitude   sum over a group's weights of |W_ij|
taylor      |g|, g = dL/dm of the group's mask at m = 1, averaged over batches (LLM-Pruner, arXiv 2305.11627, by group
            as a whole; its authors' code by default adds up |w dL/dw| weight by weight)
taylor2     |mean(g) - mean(g^2) / 2|: the second-order expansion of L(m = 1) - L(m = 0) with the Fisher diagonal in
            place of the Hessian's (LLM-Pruner, likewise)
random      uniform

Weights are read at the columns of layers that consume a group, where any do, else at the rows of those that write it.
`magnitude`, `activation` and `flap` can give z-scores of features, taken in each layer by itself (of several that read
the same dimensions, of their sum) and averaged over what a group owns (FLAP's "AL-AM").
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atp.criteria.ranking import z_scores
from atp.criteria.statistics import Batches, Moments, curvatures, fits, input_moments
from atp.criteria.surgeon import removal_costs, square_root
from atp.passes import slopes
from atp.processes import counted, dealt, summed
from atp.structure.live import effective_weight
from atp.structure.sharding import gathered
from atp.structure.space import KV, SWITCHES, VALUE, Axis, PrunableLinear, Space

Modules = Mapping[str, nn.Module]
"""Live linear layers by path."""


def magnitude(space: Space, modules: Modules, standard: bool = False) -> dict[str, Tensor]:
    """Absolute weights of each group.

    Args:
        standard: z-scores of features, averaged, instead of sums.
    """
    return _by_group(space, lambda path: _weight(modules[path]).abs(), standard)


def activation(
    space: Space, modules: Modules, forward: Callable[[Any], object], batches: Batches, standard: bool = False
) -> dict[str, Tensor]:
    """Activation-weighted magnitude; `forward(batch)` runs the model once, `standard` as above."""
    moments = _moments(space, modules, forward, batches)
    return _by_group(space, lambda path: _weight(modules[path]).abs() * moments[path].squares.sqrt(), standard)


def flap(
    space: Space, modules: Modules, forward: Callable[[Any], object], batches: Batches, standard: bool = False
) -> dict[str, Tensor]:
    """Fluctuation of what each group contributes; `forward(batch)` runs the model once, `standard` as above."""
    moments = _moments(space, modules, forward, batches)
    squared = (KV, VALUE) if standard else ()
    return _by_group(space, lambda path: _weight(modules[path]).square() * moments[path].variance, standard, squared)


def surgeon(
    space: Space,
    modules: Modules,
    masks: Mapping[str, Tensor],
    loss: Callable[[Any], Tensor],
    batches: Batches,
    grams: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What the loss rises by, nats a token, when a group goes after all cheaper ones and the layer is refitted.

    Args:
        masks: the model's live mask leaves, all ones.
        loss: of a batch, added up over labels.
        grams: takes the mean of x xᵀ of every layer whose inputs are masked, as far as memory goes.
    """
    scores: dict[str, Tensor] = {}
    linears = {linear.path: linear for linear in _masked(space)}
    readers = Counter(linear.cols.set for linear in linears.values() if linear.cols is not None)
    weighed: dict[str, list[Tensor]] = {name: [] for name in readers}
    leaves = [masks[s.name].requires_grad_(True) for s in space.sets]
    for path, found in curvatures({path: modules[path] for path in linears}, loss, leaves, batches):
        linear, weight = linears[path], _weight(modules[path]).to(found.inputs.device)
        if linear.switch is not None and linear.mask_switch:
            loss_of_all = ((weight @ found.inputs @ weight.T) * found.gradients).sum() / 2
            scores[linear.switch.set] = scores.get(linear.switch.set, torch.zeros(1)) + loss_of_all.cpu()
        if linear.rows is not None and linear.mask_rows and linear.rows.set not in readers:
            loss_of_row = (weight * (weight @ found.inputs)).sum(1) * found.gradients.diagonal() / 2
            sums = torch.zeros(int(linear.rows.owner.max()) + 1)
            scores[linear.rows.set] = sums.index_add_(0, linear.rows.owner, loss_of_row.cpu())
        if linear.cols is not None and linear.cols is space.stream:
            loss_of_column = (weight * (found.gradients @ weight)).sum(0) * found.inputs.diagonal() / 2
            scores[linear.cols.set] = scores.get(linear.cols.set, 0.0) + loss_of_column.cpu()
        elif linear.cols is not None:
            if grams is not None and fits(grams, found.inputs):
                grams[path] = found.inputs
            name = linear.cols.set  # all that read the same inputs (q, k and v) are one layer here
            weighed[name].append(square_root(found.gradients / 2) @ weight)
            if len(weighed[name]) == readers[name]:
                scores[name] = removal_costs(torch.cat(weighed.pop(name)), found.inputs, linear.cols.owner)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return scores


def taylor(
    space: Space, masks: Mapping[str, Tensor], loss: Callable[[Any], Tensor], batches: Batches, order: int = 1
) -> dict[str, Tensor]:
    """Taylor expansion of the loss in each group's mask; `loss(batch)` is a scalar under `masks`.

    Args:
        masks: the model's live mask leaves, all ones.
        order: 1 or 2.
    """
    names = [s.name for s in space.sets]
    leaves = [masks[name].requires_grad_(True) for name in names]
    absolute, total, squares = ([torch.zeros(len(leaf)) for leaf in leaves] for _ in range(3))
    count = 0
    for one in dealt(batches):
        gradients = slopes(loss(one.batch), leaves)
        count += one.counts
        for i, gradient in enumerate(gradient.cpu() for gradient in gradients if one.counts):
            absolute[i] += gradient.abs()
            total[i] += gradient
            squares[i] += gradient.square()
    for leaf in leaves:
        leaf.requires_grad_(False)
    count = counted(count)
    absolute, total, squares = ([summed(sums) for sums in each] for each in (absolute, total, squares))
    second = [(t / count - s / (2 * count)).abs() for t, s in zip(total, squares, strict=True)] if count else total
    return dict(zip(names, absolute if order == 1 else second, strict=True))


def random(space: Space, seed: int) -> dict[str, Tensor]:
    """Uniform scores from a private stream."""
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.rand(s.size, generator=generator) for s in space.sets}


def _moments(space: Space, modules: Modules, forward: Callable[[Any], object], batches: Batches) -> dict[str, Moments]:
    return input_moments({linear.path: modules[linear.path] for linear in _masked(space)}, forward, batches)


def _masked(space: Space) -> list[PrunableLinear]:
    return [one for one in space.linears if one.cols is not None or one.mask_rows or one.mask_switch]


def _by_group(
    space: Space, weigh: Callable[[str], Tensor], standard: bool, squared: Collection[str] = ()
) -> dict[str, Tensor]:
    """`weigh(path)`, `(out_features, in_features)`, of what each group owns, added up over features or as `standard`.

    Args:
        squared: kinds whose features' scores are squared.
    """
    by_input: dict[str, dict[Axis, Tensor]] = {}
    by_output: dict[str, dict[Axis, Tensor]] = {}
    for linear in _masked(space):
        weight = weigh(linear.path)
        for axis, wanted, scores, dim in (
            (linear.cols, True, by_input, 0),
            (linear.rows, linear.mask_rows, by_output, 1),
            (linear.switch, linear.mask_switch, by_output, 1),
        ):
            if axis is not None and wanted:
                of_set = scores.setdefault(axis.set, {})
                of_set[axis] = of_set.get(axis, 0.0) + weight.sum(dim)
    found, sets = by_output | by_input, {s.name: s for s in space.sets}
    groups = {}
    for name, of_axes in found.items():
        kind, size = sets[name].kind, sets[name].size
        parts = []
        for axis, features in of_axes.items():
            values = features.square() if kind in squared else features
            averaged = standard and kind not in SWITCHES
            values = z_scores(values) / axis.units if averaged else values
            parts.append(torch.zeros(size).index_add_(0, axis.owner, values))
        groups[name] = torch.stack(parts).sum(0)
    return groups


def _weight(module: nn.Module) -> Tensor:
    with gathered(module):
        return effective_weight(module).cpu()
