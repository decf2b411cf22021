"""Random numbers drawn aside. Oracle: the global states before and after."""

import torch

from atp.generator.network import DecisionGenerator
from atp.randomness import drawn_aside
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import tiny


def test_what_is_drawn_aside_is_the_seeds_and_leaves_no_trace():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with drawn_aside(torch.nn.Linear(1, 1), seed=3):
        drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    torch.set_rng_state(state)
    with drawn_aside():
        first = torch.rand(4)
    assert torch.equal(first, torch.rand(4))


def test_a_generator_seeds_no_gpu(monkeypatch):
    """Dropout there goes by the run's seed."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    space = build_space(discover(tiny.model()), "width")
    seeded.clear()
    DecisionGenerator(space, hidden_size=8, layers=1, heads=1, seed=7)
    assert seeded == []
