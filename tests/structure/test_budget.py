"""The budget.

Oracle: counts of `Space.kept_parameters`, and a brute-force search over every combination of widths on a tiny model.
"""

import itertools

import pytest
import torch

from atp.errors import BudgetError
from atp.structure.budget import TOLERANCE, budget_note, project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.space import KV, Space
from tests import families, tiny
from tests.export.cases import CASES

ROUND_TO = {"width": (1, 4, 8), "values": (1, 4, 8), "disp": (1, 4)}


def _scores(space: Space, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(s.size, generator=generator) for s in space.sets}


def _space(family: str, name: str, **settings: object) -> Space:
    return build_space(discover(families.build(family)), name, **settings)


def _check(space: Space, masks: dict[str, torch.Tensor], sparsity: float) -> float:
    """Hard, allowed, and not above the target; returns the achieved sparsity."""
    for group_set in space.sets:
        mask = masks[group_set.name]
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert int(mask.sum()) in group_set.counts
    achieved = space.sparsity(masks)
    assert achieved >= sparsity - 1e-9
    return achieved


@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[1] in ROUND_TO])
def test_the_budget_is_met_within_one_channel(family, name):
    space = _space(family, name)
    channel = space.structure.hidden_size * 3 / space.prunable_parameters
    for seed, sparsity in enumerate((0.1, 0.25, 0.4)):
        achieved = _check(space, project(_scores(space, seed), space, sparsity), sparsity)
        assert achieved - sparsity < channel


@pytest.mark.parametrize("name", ROUND_TO)
def test_groups_with_higher_scores_are_kept_first(name):
    space = _space("llama", name)
    scores = _scores(space, 3)
    masks = project(scores, space, 0.35)
    for group_set in space.sets:
        score, mask = scores[group_set.name], masks[group_set.name].bool()
        if not mask.all():
            assert score[mask].min() > score[~mask].max()


@pytest.mark.parametrize(("name", "round_to"), [(name, r) for name, rs in ROUND_TO.items() for r in rs])
def test_rounded_widths_are_multiples(name, round_to):
    space = _space("llama", name, round_to=round_to)
    for seed in range(5):
        masks = project(_scores(space, seed), space, 0.3)
        _check(space, masks, 0.3)
        for group_set in space.sets:
            count = int(masks[group_set.name].sum())
            assert group_set.kind == KV or count % round_to == 0 or count == group_set.size


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt_neox"])
def test_uniform_widths_are_equal_while_choices_differ(family):
    space = _space(family, "width", uniform=True)
    masks = project(_scores(space, 5), space, 0.3)
    _check(space, masks, 0.3)
    for kind in space.kinds:
        members = [masks[s.name] for s in space.sets if s.kind == kind]
        assert len({int(m.sum()) for m in members}) == 1
    channels = [masks[s.name] for s in space.sets if s.kind == "mlp"]
    assert not torch.equal(channels[0], channels[1])


@pytest.mark.parametrize("uniform", [False, True])
def test_an_unreachable_sparsity_is_an_error_that_says_the_reach(uniform):
    space = _space("llama_mqa", "width", uniform=uniform)
    with pytest.raises(BudgetError, match=r"sparsity=0\.95 cannot be reached.*remove 0\.\d+"):
        project(_scores(space, 0), space, 0.95)


def test_a_result_off_the_asked_sparsity_is_said():
    space = _space("llama", "width", uniform=True, round_to=20)
    masks = project(_scores(space, 0), space, 0.3)
    assert "not reachable exactly" in budget_note(space, masks, 0.3)
    assert budget_note(space, masks, space.sparsity(masks)) is None


def _closest(space: Space, sparsity: float) -> float:
    """The largest reachable kept share that is not above the target, by trying everything."""
    target = (1 - sparsity) * space.prunable_parameters
    if space.uniform:
        by_kind = {kind: next(s.counts for s in space.sets if s.kind == kind) for kind in space.kinds}
        choices = [
            [values[space.kinds.index(s.kind)] for s in space.sets] for values in itertools.product(*by_kind.values())
        ]
    else:
        choices = itertools.product(*(s.counts for s in space.sets))
    totals = (space.kept_parameters(torch.tensor(c, dtype=torch.float64)).item() for c in choices)
    return max(total for total in totals if total <= target) / space.prunable_parameters


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("round_to", [5, 8, 10, 20])
@pytest.mark.parametrize("favour", ["kv", "mlp", None])
def test_the_closest_reachable_budget_is_found(uniform, round_to, favour):
    """Whatever the scores prefer, a coarse step must not leave a gap that trading kinds would close."""
    space = _space("llama", "width", uniform=uniform, round_to=round_to)
    for seed, sparsity in enumerate((0.05, 0.12, 0.2, 0.31, 0.4, 0.55)):
        scores = {name: s + 100.0 * (name.split(".")[1] == favour) for name, s in _scores(space, seed).items()}
        achieved = _check(space, project(scores, space, sparsity), sparsity)
        best = 1 - _closest(space, sparsity)
        assert achieved - best <= max(1e-9, TOLERANCE - (best - sparsity))


@pytest.mark.parametrize(("blocks", "sparsity", "left"), [(10, 0.8, 2), (30, 0.8, 6), (30, 0.9, 3), (10, 0.9, 1)])
def test_whole_blocks_that_are_just_the_budget_stay(blocks: int, sparsity: float, left: int) -> None:
    """1 - 0.8 is less than 0.2 in floating point."""
    space = build_space(discover(tiny.model(num_hidden_layers=blocks)), "depth", uniform=True)
    masks = project(_scores(space, 0), space, sparsity)
    assert space.sparsity(masks) == pytest.approx(1 - left / blocks)
    assert budget_note(space, masks, sparsity) is None
