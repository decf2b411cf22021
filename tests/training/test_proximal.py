"""The proximal step. Oracle: the equation written as loops over groups in float64."""

import pytest
import torch
from peft.tuners.lora import LoraLayer

from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm
from atp.structure.space import Axis
from atp.training.proximal import _squares, proximal_step, pruned_share
from tests import runs


@pytest.mark.parametrize("name", ["width", "values", "disp"])
def test_pruned_groups_shrink_by_the_equation_and_kept_ones_stay(name: str) -> None:
    model = runs.peft_model()
    space = build_space(discover(model), name, round_to=1)
    modules = {linear.path: causal_lm(model).get_submodule(linear.path) for linear in space.linears}
    for layer in modules.values():
        assert isinstance(layer, LoraLayer)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    masks = project({s.name: torch.rand(s.size) for s in space.sets}, space, 0.4)
    before = {
        path: (m.lora_A["default"].weight.clone(), m.lora_B["default"].weight.clone()) for path, m in modules.items()
    }
    eta, beta = 0.01, 3.0
    rho = pruned_share(space, masks)
    proximal_step(space, modules, masks, rho, eta, beta)
    assert sum(rho.values()) == pytest.approx(1.0)
    kinds = {s.name: s.kind for s in space.sets}
    shrunk = 0
    for linear in space.linears:
        a, b = (weight.double() for weight in before[linear.path])
        for weight, axis in ((a.T, linear.cols), (b, linear.rows)):
            for group in range(len(masks[axis.set])) if axis else ():
                if masks[axis.set][group] == 0:
                    rows = axis.owner == group
                    shrunk += 1
                    weight[rows] *= max(0.0, 1 - eta * beta * rho[kinds[axis.set]] / weight[rows].norm().item())
        layer = modules[linear.path]
        torch.testing.assert_close(layer.lora_A["default"].weight.double(), a, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(layer.lora_B["default"].weight.double(), b, rtol=1e-5, atol=1e-8)
    assert shrunk > 0


def test_nothing_pruned_nothing_shrunk() -> None:
    model = runs.peft_model()
    space = build_space(discover(model), "width", round_to=1)
    modules = {linear.path: causal_lm(model).get_submodule(linear.path) for linear in space.linears}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    proximal_step(space, modules, space.full(), pruned_share(space, space.full()), 0.01, 3.0)
    assert runs.same(before, dict(model.state_dict()))
    assert set(pruned_share(space, space.full()).values()) == {0.0}


def test_what_fills_up_the_last_part_of_a_sharded_parameter_counts_for_no_group(monkeypatch) -> None:
    """ZeRO-3 leaves memory as it was there: of ten numbers over four processes the last holds one and two of those."""
    weight, axis = torch.arange(10.0).reshape(2, 5), Axis("mlp", torch.tensor([0, 0, 1, 1, 2]), 2)
    parts = torch.cat([weight.flatten(), torch.full((2,), float("nan"))]).split(3)
    found = torch.zeros(3)
    for rank, own in enumerate(parts):
        parameter = torch.nn.Parameter(torch.empty(0))
        parameter.ds_tensor, parameter.ds_numel, parameter.ds_shape = own, 10, weight.shape
        parameter.ds_process_group = None
        monkeypatch.setattr(torch.distributed, "get_rank", lambda _, rank=rank: rank)
        found += _squares(parameter, 1, axis, 3)
    whole = weight.square().sum(0)
    assert torch.equal(found, torch.stack([whole[:2].sum(), whole[2:4].sum(), whole[4]]))
