"""The learner. Oracle: autograd straight through real masks, against the gradient gathered at mask leaves."""

from contextlib import nullcontext

import pytest
import torch

from atp.errors import DivergedError, UnsupportedModelError
from atp.generator.sampling import add_noise, soften, straight_through, threshold
from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.training.compensation import Compensation
from atp.training.learner import DecisionLearner
from atp.training.losses import budget_loss
from atp.training.schedule import Schedule
from tests import runs


def learner(**changes: object) -> DecisionLearner:
    model = runs.peft_model()
    config = runs.config(init="ones", **changes)
    space = build_space(discover(model), config.space, round_to=1)
    attachment = attach(model, space)
    uncompensated = Compensation("none", attachment, lambda _: None, ())
    made = DecisionLearner(config, attachment, Schedule.of(config, 20), lambda: None, uncompensated)
    made.start()
    return made


@pytest.mark.parametrize("space", ["width", "values", "disp"])
def test_update_is_the_straight_through_gradient(space: str) -> None:
    made = learner(space=space, on_budget=False, budget_ramp=0.0, logit_bias=0.2)
    weights = {s.name: torch.randn(s.size) for s in made.space.sets}

    def loss(masks: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(((masks[k] * w).sum() + 0.3).square() for k, w in weights.items())

    state = made._random.get_state()
    noisy = add_noise(made.generator(), made.schedule.noise(0), made._random)
    hard, soft = threshold(noisy), soften(noisy, 0.4)
    masks = straight_through(hard, soft)
    wanted = loss(masks) + made.config.budget_weight * budget_loss(masks, made.space, 0.4)
    wanted.backward()
    expected = {k: p.grad.clone() for k, p in made.generator.named_parameters() if p.grad is not None}
    made.generator.zero_grad()

    made._random.set_state(state)
    made.begin_step(0)
    assert all(torch.equal(made.attachment.masks[k], hard[k]) for k in hard)
    loss(made.attachment.masks).backward()
    made.update_from_step()
    for name, parameter in made.generator.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_never_reaches_the_generator() -> None:
    """Under a gradient scaler it is passed over, as the scaler's owner passes its step over; else the run ends."""
    made = learner()
    before = {name: p.clone() for name, p in made.generator.named_parameters()}
    for scale in (1024.0, 1.0):
        made.begin_step(0)
        sum(mask.sum() for mask in made.attachment.masks.values()).mul(float("inf")).backward()
        with pytest.raises(DivergedError, match="at step 0") if scale == 1.0 else nullcontext():
            made.update_from_step(scale)
        assert all(torch.equal(p, before[name]) for name, p in made.generator.named_parameters())


def test_alternating_takes_its_gradient_under_soft_masks_and_leaves_lora_without_any() -> None:
    made = learner(mode="alternating", logit_bias=0.0)
    seen = []

    def loss() -> torch.Tensor:
        seen.append({k: v.detach().clone() for k, v in made.attachment.masks.items()})
        return sum(m.sum() for m in made.attachment.masks.values())

    made.alternate(0, loss)
    values = torch.cat(list(seen[0].values()))
    assert ((values > 0) & (values < 1)).all()
    made.begin_step(0)
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in made.attachment.masks.values())
    assert not any(m.requires_grad for m in made.attachment.masks.values())


def test_alternating_survives_a_gradient_that_float16_rounds_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = learner(mode="alternating"), {}
    monkeypatch.setattr(made, "_update", lambda gradients: found.update(gradients))
    tokens = torch.full((4096, 1), 2e-4)
    made.alternate(0, lambda: sum((m * tokens).half().float().mean() * 1e-3 for m in made.attachment.masks.values()))
    for gradient in found.values():
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2e-7 / len(gradient)), rtol=5e-2, atol=0.0)


@pytest.mark.parametrize(
    ("settings", "compact"),
    [
        ({"mode": "alternating"}, [True, True, True]),
        ({"generator_every": 2}, [False, True, False]),
        ({"generator_every": 2, "impl": "eager"}, [False, False, False]),
    ],
)
def test_only_kept_is_computed_where_no_gradient_of_a_mask_is_asked_for(settings, compact) -> None:
    made, found = learner(**settings), []
    for step in range(3):
        made.begin_step(step)
        found.append(made.attachment.is_compact)
    assert found == compact


@pytest.mark.parametrize(
    ("settings", "compact"),
    [({}, True), ({"on_budget": False}, False), ({"on_budget": False, "impl": "compact"}, True)],
)
def test_a_gpu_computes_only_kept_where_widths_suit_it(settings, compact, monkeypatch) -> None:
    """The final decision is always on budget."""
    made = learner(mode="alternating", **settings)
    monkeypatch.setattr(DecisionLearner, "_on_gpu", True)
    made.begin_step(0)
    assert made.attachment.is_compact is compact
    made.freeze()
    assert made.attachment.is_compact


def test_every_hard_decision_is_on_budget_and_freezing_drops_the_noise() -> None:
    made = learner(budget_ramp=0.0, logit_bias=0.0)
    for step in range(12):
        made.begin_step(step)
        assert 0 <= made.space.sparsity(made.attachment.masks) - 0.4 <= 0.02
    assert not made.frozen
    made.begin_step(12)
    first = made.attachment.decision()
    made.begin_step(13)
    assert made.frozen_at == 12
    assert runs.same(first, made.attachment.decision())


def test_budget_ramps_up_only_from_all_ones() -> None:
    schedule = Schedule.of(runs.config(init="ones", budget_ramp=0.5, freeze_at=0.5), 40)
    sparsities = [schedule.sparsity(step) for step in range(20)]
    assert sparsities == sorted(sparsities)
    assert 0 < sparsities[0] < 0.05
    assert sparsities[10:] == [0.4] * 10
    assert Schedule.of(runs.config(), 40).sparsity(0) == 0.4


def test_budget_loss_is_the_papers() -> None:
    made = learner()
    full = made.space.full()
    assert budget_loss(full, made.space, 0.4).item() == pytest.approx(-torch.log(torch.tensor(0.6)).item())
    half = {k: m * 0.5 for k, m in full.items()}
    share = made.space.kept_parameters(made.space.kept_counts(half)).item() / made.space.prunable_parameters
    assert budget_loss(half, made.space, 0.1).item() == pytest.approx(abs(torch.log(torch.tensor(share / 0.9)).item()))


def test_noise_is_centred_private_and_reproducible() -> None:
    logits = {"a": torch.zeros(200_000)}
    before = torch.get_rng_state()
    first = add_noise(logits, 1.0, torch.Generator().manual_seed(0))["a"]
    again = add_noise(logits, 1.0, torch.Generator().manual_seed(0))["a"]
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert abs(first.mean().item()) < 0.02
    assert first.std().item() == pytest.approx(torch.pi / 6**0.5, rel=0.02)


def decided(share: float, **changes: object) -> tuple[DecisionLearner, list[int]]:
    """A learner whose criterion prefers the groups of low index at its first call, and of high index later."""
    calls: list[int] = []

    def draw() -> dict[str, torch.Tensor]:
        calls.append(made.step)
        sign = 1.0 if len(calls) == 1 else -1.0
        return {s.name: -sign * torch.linspace(-1, 1, s.size) for s in made.space.sets}

    config = runs.config(freeze_at=share, **changes)
    model = runs.peft_model()
    attachment = attach(model, build_space(discover(model), "width", round_to=1))
    uncompensated = Compensation("none", attachment, lambda _: None, ())
    made = DecisionLearner(config, attachment, Schedule.of(config, 20), draw, uncompensated)
    made.start()
    return made, calls


def test_a_criterion_decides_by_the_weights_at_the_freeze_and_keeps_all_before() -> None:
    made, calls = decided(0.5, decision="criterion")
    for step in range(10):
        made.begin_step(step)
        assert all(m.all() for m in made.attachment.masks.values())
        made.update_from_step()
    made.begin_step(10)
    assert (calls, made.frozen_at) == ([0, 10], 10)
    assert made.attachment.masks["0.mlp"][-1] == 1.0
    assert made.attachment.masks["0.mlp"][0] == 0.0
    assert made.overlap()["mlp"] < 0.5


def test_shots_take_away_step_by_step_and_nothing_comes_back() -> None:
    made, calls = decided(0.5, decision="criterion", shots=3)
    sparsities, last = [], None
    for step in range(12):
        made.begin_step(step)
        now = made.attachment.decision()
        sparsities.append(round(made.space.sparsity(now), 2))
        assert last is None or all((now[k] <= last[k]).all() for k in now)
        last = now
    assert calls == [0, 5, 10]
    assert sparsities == [0.13] * 5 + [0.27] * 5 + [0.4] * 2
    assert made.frozen_at == 10


def test_prune_then_tune_draws_once_and_overlaps_with_itself() -> None:
    made, calls = decided(0.0, decision="criterion")
    made.begin_step(0)
    assert (calls, made.frozen_at) == ([0], 0)
    assert made.overlap() == {"kv": 1.0, "mlp": 1.0}


def test_a_kind_of_which_nothing_was_pruned_overlaps_wholly() -> None:
    made, _ = decided(0.0, decision="criterion")
    made.begin_step(0)
    made._first = made._first | {s.name: torch.ones(s.size) for s in made.space.sets if s.kind == "kv"}
    assert made.overlap() == {"kv": 1.0, "mlp": 1.0}


def test_free_logits_learn_without_a_network() -> None:
    made, _ = decided(0.5, decision="logits", generator_lr=0.1)
    before = {k: v.clone() for k, v in made.generator().items()}
    made.begin_step(0)
    sum(m[0] for m in made.attachment.masks.values()).backward()
    made.update_from_step()
    after = made.generator()
    assert all(after[k][0] < before[k][0] for k in before), "a group that costs loss falls"


@pytest.mark.parametrize(("impl", "compact"), [("auto", True), ("compact", True), ("eager", False)])
def test_a_final_decision_computes_only_what_is_kept_unless_asked_not_to(impl: str, compact: bool) -> None:
    made = learner(impl=impl)
    made.begin_step(0)
    assert not made.attachment.is_compact
    made.freeze()
    assert made.attachment.is_compact == compact
    state = made.state()
    resumed = learner(impl=impl)
    resumed.load_state(*state)
    assert resumed.attachment.is_compact == compact


def test_compact_is_refused_before_training_where_it_cannot_be_had() -> None:
    attachment = learner().attachment
    path = attachment.space.linears[1].path
    attachment.modules[path].lora_variant["default"] = object()
    config = runs.config(impl="compact")
    unused = Compensation("none", attachment, lambda _: None, ())
    with pytest.raises(UnsupportedModelError, match=f"{path} is none: use impl='auto'"):
        DecisionLearner(config, attachment, Schedule.of(config, 20), lambda: None, unused)


def test_kernels_are_refused_where_they_cannot_be_had(monkeypatch) -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs the package triton, and a GPU .*: use impl='auto'"):
        learner(impl="triton")
    monkeypatch.setattr("atp.training.learner.uses_triton", lambda x, impl: True)
    monkeypatch.setattr("atp.layers.Attachment.fuse_blocks", lambda self, impl: False)
    with pytest.raises(
        UnsupportedModelError, match=r"blocks like Llama's, and LlamaForCausalLM has none: use impl='auto'"
    ):
        learner(impl="triton")
