"""The generator: shapes, float32, the start it is given, and a private stream for its weights."""

import torch

from atp.generator.network import DecisionGenerator
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import tiny


def test_logits_have_one_entry_per_group_and_begin_at_the_start() -> None:
    space = build_space(discover(tiny.model().to(torch.bfloat16)), "disp", round_to=1)
    before = torch.get_rng_state()
    generator = DecisionGenerator(space, 16, 2, 4, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    start = {s.name: torch.randn(s.size) for s in space.sets}
    generator.set_start(start)
    logits = generator()
    assert {k: v.shape for k, v in logits.items()} == {s.name: (s.size,) for s in space.sets}
    assert all(z.dtype == torch.float32 for z in logits.values())
    assert max((logits[k] - start[k]).abs().max().item() for k in start) < 0.1
    sum(z.sum() for z in logits.values()).backward()
    assert all(p.grad is not None for p in generator.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in generator.start.values())
