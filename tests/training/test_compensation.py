"""Compensation. Oracles: outputs of the untouched layer; a float64 mean; the live masked model for what is exported."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atp.callback import restore
from atp.criteria import statistics
from atp.criteria.ranking import rank
from atp.criteria.scores import magnitude
from atp.errors import UnsupportedModelError
from atp.export import export
from atp.layers import attach
from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.training.compensation import Compensation
from tests import families, runs, tiny

IDS = [torch.randint(2, 384, (6, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
WRITER, ATTENTION_WRITER = "model.layers.2.mlp.down_proj", "model.layers.2.self_attn.o_proj"


def attached(space: str = "width", how: str = "weights", uniform: bool = False, dropout: float = 0.0) -> tuple:
    """A tiny LoRA model, its decision, and a compensation that has not been applied."""
    model = runs.peft_model(dropout).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    table = build_space(discover(model), space, uniform, round_to=1)
    attachment = attach(model, table)
    decision = project(rank(magnitude(table, attachment.modules), table, "block", (0, 1)), table, 0.4)
    compensation = Compensation(how, attachment, lambda ids: model(input_ids=ids), IDS)
    return model, attachment, decision, compensation


@pytest.mark.parametrize("how", ["weights", "bias"])
@pytest.mark.parametrize("space", ["width", "values", "disp"])
def test_what_stays_stands_in_for_what_goes(space: str, how: str) -> None:
    model, attachment, decision, compensation = attached(space, how)
    layer, seen = attachment.modules[ATTENTION_WRITER if space == "values" else WRITER], {}
    hook = layer.register_forward_pre_hook(lambda m, args: seen.setdefault("x", args[0].detach()))
    model(input_ids=IDS[0])
    hook.remove()
    whole = layer(seen["x"])
    attachment.set_masks(decision | ({"2.mlp_out": torch.ones(32)} if space == "disp" else {}))
    before = (layer(seen["x"]) - whole).square().mean()
    attachment.set_masks(attachment.space.full())
    compensation.apply(decision, attachment.space.full())
    attachment.set_masks(decision | ({"2.mlp_out": torch.ones(32)} if space == "disp" else {}))
    after = (layer(seen["x"]) - whole).square().mean()
    assert after < (0.9 if how == "weights" else 1.0) * before


@pytest.mark.parametrize("how", ["weights", "bias", "follow"])
def test_dropout_is_off_while_it_measures(how: str) -> None:
    found = []
    for dropout in (0.0, 0.5):
        _, attachment, decision, compensation = attached(how=how, dropout=dropout)
        attachment.lm.train()
        compensation.apply(decision, attachment.space.full())
        found.append(compensation.state())
        assert all(module.training for module in attachment.lm.modules())
    assert runs.same(*found)


def test_the_bias_is_the_mean_of_what_is_lost() -> None:
    _, attachment, decision, compensation = attached(how="bias")
    layer, inputs = attachment.modules[WRITER], []
    hook = layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach().double().flatten(0, 1)))
    compensation.apply(decision, attachment.space.full())
    hook.remove()
    gone = decision["2.mlp"] == 0
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
    wanted = weight[:, gone].double() @ torch.cat(inputs).mean(0)[gone]
    torch.testing.assert_close(layer.get_base_layer().bias.double(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("how", ["weights", "follow", "bias"])
@pytest.mark.parametrize(("space", "uniform"), [("width", False), ("width", True), ("disp", False)])
def test_exported_equals_masked(space: str, uniform: bool, how: str, tmp_path) -> None:
    model, attachment, decision, compensation = attached(space, how, uniform)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    compensation.apply(decision, attachment.space.full())
    attachment.set_masks(decision)
    assert any(not torch.equal(v, untouched.get(k, torch.tensor(0.0))) for k, v in model.state_dict().items())
    export(model, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5
    assert (tmp_path / "pruned" / "modeling_atp.py").exists() == (not uniform or how == "bias")


@pytest.mark.parametrize("how", ["weights", "follow", "bias"])
def test_state_puts_the_same_weights_into_a_fresh_model(how: str) -> None:
    model, attachment, decision, compensation = attached(how=how)
    assert compensation.state() == {}
    compensation.apply(decision, attachment.space.full())
    attachment.set_masks(decision)
    fresh, other, _, again = attached(how=how)
    again.load_state(compensation.state())
    other.set_masks(decision)
    assert runs.same(dict(again.state()), dict(compensation.state()))
    assert torch.equal(families.logits(fresh), families.logits(model))


def test_two_shots_compensate_once_for_each_group() -> None:
    """Oracle: least squares from the original weight for the columns that are left, where inputs do not change."""
    _, attachment, decision, _ = attached()
    layer = attachment.modules[WRITER]
    x = torch.randn(4, 40, 48, generator=torch.Generator().manual_seed(5)) * torch.linspace(0.2, 2.0, 48)
    twice = Compensation("weights", attachment, lambda batch: layer(batch), [x])
    original = layer.get_base_layer().weight + layer.get_delta_weight("default")
    full = attachment.space.full()
    first = {k: torch.where(torch.arange(len(m)) % 2 > 0, torch.ones(()), m) for k, m in decision.items()}
    rest = {k: v for k, v in attachment.modules.items() if k != WRITER}
    for path in rest:
        twice._linears.pop(path, None)
    twice.apply(first, full)
    twice.apply(decision, first)
    keep = decision["2.mlp"] > 0
    flat = x.flatten(0, 1)
    best = torch.linalg.lstsq(flat[:, keep], flat @ original.T).solution.T
    fitted = (layer.get_base_layer().weight + layer.get_delta_weight("default"))[:, keep]

    def error(columns: torch.Tensor) -> float:
        return (flat[:, keep] @ columns.T - flat @ original.T).square().sum().item()

    assert error(fitted) <= 1.02 * error(best)


@pytest.mark.parametrize("how", ["weights", "bias"])
@pytest.mark.parametrize("resumed", [False, True])
def test_another_decision_starts_from_the_original_weights(how: str, resumed: bool) -> None:
    """Oracle: the decision applied to an untouched model, where the layers' inputs are the same for both."""
    _, attachment, decision, _ = attached(how=how)
    full = attachment.space.full()
    other = full | {"0.mlp": decision["1.mlp"], "1.kv": torch.tensor([1.0, 0.0])}
    inputs = {
        path: torch.randn(1, 60, 48 if "mlp" in path else 32)
        for path in attachment.modules
        if "down" in path or "o_proj" in path
    }

    def feed(attached_to: object) -> None:
        for path, x in inputs.items():
            attached_to.modules[path](x)

    twice = Compensation(how, attachment, lambda _: feed(attachment), [0])
    twice.apply(other, full)
    if resumed:
        saved = {k: v.clone() for k, v in twice.state().items()}
        _, attachment, _, _ = attached(how=how)
        twice = Compensation(how, attachment, lambda _: feed(attachment), [0])
        twice.load_state(saved)
    twice.apply(decision, full)
    _, untouched, _, _ = attached(how=how)
    once = Compensation(how, untouched, lambda _: feed(untouched), [0])
    once.apply(decision, full)
    assert runs.same(dict(twice.state()), dict(once.state()))
    weights = {p: m.get_base_layer().weight for p, m in attachment.modules.items()}
    assert runs.same(weights, {p: m.get_base_layer().weight for p, m in untouched.modules.items()})


@pytest.mark.parametrize("space", ["width", "values", "disp"])
def test_every_layer_is_measured_before_any_is_changed(space: str, monkeypatch) -> None:
    """Oracle: enough memory to measure all in one pass."""
    states = []
    for budget in (1 << 30, 1):
        monkeypatch.setattr(statistics, "_spare_bytes", lambda _device, budget=budget: budget)
        _, attachment, decision, compensation = attached(space)
        compensation.apply(decision, attachment.space.full())
        states.append(dict(compensation.state()))
    assert runs.same(*states)


def test_measurements_at_hand_are_used_once_and_forgotten() -> None:
    _, attachment, decision, measured = attached()
    measured.apply(decision, attachment.space.full())
    _, attachment, decision, given = attached()
    linears = {linear.path: attachment.modules[linear.path] for linear in attachment.space.linears if linear.mask_cols}
    given.grams |= {path: gram / 288 for path, gram in statistics.input_grams(linears, given._forward, IDS)}
    given._forward = None  # nothing is left to measure
    given.apply(decision, attachment.space.full())
    assert given.grams == {}
    expected = measured.state()
    for name, tensor in given.state().items():
        assert families.relative_error(tensor, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("how", ["weights", "follow", "bias"])
def test_going_back_to_before(how: str) -> None:
    model, attachment, decision, _ = attached(how=how)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    revertible = Compensation(how, attachment, lambda ids: model(input_ids=ids), IDS)
    revertible.apply(decision, attachment.space.full())
    assert not runs.same(before, dict(model.state_dict()))
    revertible.load_state({})
    assert runs.same(before, dict(model.state_dict()))


def test_a_quantised_model_is_refused_or_left_alone() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    _, attachment, decision, _ = attached()
    base = attachment.modules[WRITER].get_base_layer()
    attachment.modules[WRITER].base_layer = bitsandbytes.nn.Linear8bitLt(
        base.in_features, base.out_features, bias=False, has_fp16_weights=False
    )
    attachment.modules[WRITER].base_layer.weight = bitsandbytes.nn.Int8Params(
        torch.zeros(base.weight.shape, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"down_proj: its weight is quantised: use 'bias' or 'auto'"):
        Compensation("weights", attachment, lambda _: None, ())
    automatic = Compensation("auto", attachment, lambda _: None, ())
    automatic.apply(decision, attachment.space.full())
    assert (automatic.how, automatic.state()) == ("none", {})


@pytest.mark.parametrize("how", ["weights", "follow", "bias"])
def test_a_finished_run_is_restored_with_its_changed_weights(how: str, tmp_path) -> None:
    run = runs.trainer(tmp_path, runs.config(compensate=how, impl="eager"))
    run.train()
    model = PeftModel.from_pretrained(tiny.model(), tmp_path / "final").eval()
    restore(model, tmp_path / "final")
    assert torch.equal(families.logits(model), families.logits(run.model.eval()))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert families.relative_error(families.logits(exported), families.logits(model)) <= 1e-5
