"""Trials of starts. Oracles: costs whose minimum is known; the model refitted and measured by hand."""

import dataclasses

import pytest
import torch
from torch import Tensor

from atp import ATPCallback, ATPConfig
from atp.strategies import strategy_config
from atp.training.calibration import row_hash
from atp.training.run import PruningRun
from atp.training.trials import Lean, Trials, is_less
from tests import runs
from tests.training.test_compensation import attached
from tests.training.test_held_out import by_hand, held_out

FIRST = Lean(tilt=0.3, attention=0.0, floor=0.6)


class Costs:
    """A decision for each lean, the number of the lean in binary, and what each costs."""

    def __init__(self, cost) -> None:
        self._cost, self._leans, self.asked = cost, {}, []

    def decide(self, lean: Lean) -> dict[str, Tensor]:
        index = self._leans.setdefault(lean, len(self._leans))
        return {"a": torch.tensor([float(bit) for bit in f"{index:012b}"])}

    def __call__(self, decision) -> Tensor:
        index = int("".join(str(int(bit)) for bit in decision["a"]), 2)
        self.asked.append(next(lean for lean, i in self._leans.items() if i == index))
        return batches([self._cost(self.asked[-1])] * 3)


def batches(costs: list[float]) -> Tensor:
    """Nats a token of so many batches of 10 tokens, as trials want them."""
    return torch.tensor([[cost * 10, 10] for cost in costs], dtype=torch.float64)


def bowl(lean: Lean) -> float:
    """Least at a tilt of 0.9, attention of -0.25 and a floor of 1."""
    return 3.0 + (lean.tilt - 0.9) ** 2 + (lean.attention + 0.25) ** 2 + (lean.floor - 1.0) ** 2


def test_the_best_is_found_step_by_step_and_nothing_is_asked_twice() -> None:
    costs = Costs(bowl)
    trials = Trials(costs, most=100, quiet=True)
    found = trials.best(FIRST, costs.decide)
    assert dataclasses.astuple(found) == pytest.approx((0.9, -0.25, 1.0))
    assert trials.metrics() == {"init_tilt": 0.9, "init_attention": -0.25, "init_floor": 1.0}
    assert costs.asked[0] == FIRST
    assert len(set(costs.asked)) == len(costs.asked) < 30
    assert all(0.0 <= lean.floor <= 1.0 for lean in costs.asked)


def test_tilt_and_attention_may_have_to_move_together() -> None:
    """SmolLM2 at 50 %: either by itself is no better."""

    def valley(lean: Lean) -> float:
        tilt, attention = (lean.tilt - 0.3) / 0.3, lean.attention / 0.25
        return 3.0 + abs(tilt - attention) + 0.1 * (tilt - 2.0) ** 2

    costs = Costs(valley)
    assert Trials(costs, 12, quiet=True).best(FIRST, costs.decide) == Lean(tilt=0.9, attention=0.5, floor=0.6)


@pytest.mark.parametrize("most", [1, 5])
def test_no_more_are_tried_than_wanted(most: int) -> None:
    costs = Costs(bowl)
    found = Trials(costs, most, quiet=True).best(FIRST, costs.decide)
    assert len(costs.asked) == most + 1
    assert bowl(found) == min(map(bowl, costs.asked)) < bowl(FIRST)


def test_none_leave_the_first_as_it_is() -> None:
    costs = Costs(bowl)
    trials = Trials(costs, 0, quiet=True)
    assert trials.metrics() == {}
    assert trials.best(FIRST, costs.decide) == FIRST
    assert not costs.asked


@pytest.mark.parametrize(
    ("costs", "less"),
    [
        ([3.0, 4.0, 5.0], False),  # nothing
        ([2.9, 3.9, 4.9], True),  # a little, everywhere
        ([2.9, 4.0, 5.0], False),  # 0.033 +- 0.033
        ([2.8, 3.9, 5.0], True),  # 0.1 +- 0.058
        ([2.4, 4.5, 4.9], False),  # 0.067 +- 0.318
        ([3.1, 4.1, 5.1], False),
        ([float("nan"), 3.0, 3.0], False),
    ],
)
def test_a_gain_is_more_than_its_standard_error(costs: list[float], less: bool) -> None:
    assert is_less(batches(costs), batches([3.0, 4.0, 5.0])) == less


def test_no_spread_is_known_of_one_batch() -> None:
    assert not is_less(batches([1.0]), batches([3.0]))


def test_longer_batches_count_for_more() -> None:
    tokens = torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)
    cost, other = torch.tensor([3.9, 3.9, 2.0]), torch.tensor([3.0, 3.0, 3.0])
    assert is_less(torch.stack([cost * tokens, tokens], 1), torch.stack([other * tokens, tokens], 1))


def test_leans_that_lead_to_one_decision_are_one_trial() -> None:
    asked = []
    trials = Trials(lambda d: asked.append(d) or batches([1.0, 1.0]), 9, quiet=True)
    found = trials.best(FIRST, lambda _: {"a": torch.ones(3)})
    assert found == FIRST
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("space", "how"),
    [(space, how) for space in ("width", "values", "disp") for how in ("weights", "follow")]
    + [("hidden+depth", "follow")],
)
def test_a_trial_is_nearly_a_final_decision_and_leaves_nothing_behind(space: str, how: str) -> None:
    model, attachment, decision, compensation = attached(space, how)
    compensation.final_batches = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = {path: attachment.modules[path] for path in compensation._linears}
    grams = dict(compensation._grams_of(layers, compensation._batches))
    compensation.grams.update(grams)
    with compensation.on_trial(decision):
        tried = held_out(model, attachment, compensation).pruned()
    assert runs.same(model.state_dict(), before)
    assert compensation.grams == grams
    assert not compensation.state()
    assert all(mask.all() for mask in attachment.decision().values())
    compensation.final_batches = compensation._batches
    compensation._reader_rounds = 0
    compensation.apply(decision, attachment.decision())
    attachment.set_masks(decision)
    assert tried == pytest.approx(by_hand(model), rel=1e-5)
    compensation.undo()
    assert abs(by_hand(model) - tried) > 1e-5, "the refit counts"


def test_a_run_starts_from_what_trials_find(tmp_path, monkeypatch) -> None:
    """Oracle: a run that is told so."""

    def first(**changes) -> tuple[dict[str, Tensor], dict]:
        run = runs.trainer(tmp_path, runs.config(noise=0.0, **changes), max_steps=2)
        run.train()
        callback = runs.callback_of(run)
        leans.append(callback.summary()["lean"])
        return callback.learner._first, run.state.log_history[0]

    leans: list[dict[str, float] | None] = []
    leaning, untold = first(init_tilt=0.6, init_attention=0.25, init_trials=0)
    costs = iter([3.0, 2.0])
    monkeypatch.setattr(PruningRun, "_on_trial", lambda _run, _decision: batches([next(costs, 2.5)] * 2))
    found, logged = first(init_tilt=0.3, init_trials=3)
    assert runs.same(found, leaning)
    assert not runs.same(found, first(init_tilt=0.3, init_trials=0)[0])
    assert (logged["atp/init_tilt"], logged["atp/init_attention"], logged["atp/init_floor"]) == (0.6, 0.25, 0.6)
    assert leans == [None, {"tilt": 0.6, "attention": 0.25, "floor": 0.6}, None]
    assert "atp/init_tilt" not in untold


def test_a_resumed_run_knows_what_was_found_and_tries_no_more(tmp_path, monkeypatch) -> None:
    costs = iter([3.0, 2.0])
    monkeypatch.setattr(PruningRun, "_on_trial", lambda _run, _decision: batches([next(costs)] * 2))
    wanted = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    runs.trainer(tmp_path, runs.config(init_trials=1), **wanted).train()
    resumed = runs.trainer(tmp_path, runs.config(init_trials=1), **wanted)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert runs.callback_of(resumed).summary()["lean"] == {"tilt": 0.6, "attention": 0.25, "floor": 0.6}
    assert resumed.state.log_history[-2]["atp/init_tilt"] == 0.6


def test_later_shots_keep_to_what_was_found_before_the_first(tmp_path, monkeypatch) -> None:
    """Oracle: a run that is told so."""

    def last(**changes) -> dict[str, Tensor]:
        settings = {"decision": "criterion", "shots": 2, "start_at": 0.25, "freeze_at": 0.75} | changes
        run = runs.trainer(tmp_path, runs.config(**settings), max_steps=4)
        run.train()
        return runs.callback_of(run).learner.decision(final=True)

    leaning, costs = last(init_tilt=0.6, init_attention=0.25, init_trials=0), iter([3.0, 2.0])
    monkeypatch.setattr(PruningRun, "_on_trial", lambda _run, _decision: batches([next(costs)] * 2))
    assert runs.same(last(init_tilt=0.3, init_trials=1), leaning)
    assert not runs.same(last(init_tilt=0.3, init_trials=0), leaning)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 11), (16, 8)])
def test_a_run_judges_by_rows_that_layers_are_not_refitted_to(batch_size, count, tmp_path, monkeypatch) -> None:
    """44 of 48 rows are left."""
    seen = []
    real = PruningRun._on_trial

    def watched(run: PruningRun, decision) -> Tensor:
        seen.append((run, real(run, decision)))
        return seen[-1][1]

    monkeypatch.setattr(PruningRun, "_on_trial", watched)
    sizes = {"max_steps": 2, "per_device_train_batch_size": batch_size}
    runs.trainer(tmp_path, runs.config(calibration_batch_size=4), train=runs.dataset(48), **sizes).train()
    assert len(seen) > 1
    for run, cost in seen:
        assert run.calibration.hashes().isdisjoint(map(row_hash, run._judges))
        assert len(run._judges) == 44
        assert len(cost) == count
        assert cost.isfinite().all()


def test_streams_have_no_rows_to_judge_by(tmp_path, monkeypatch) -> None:
    stream = runs.dataset(48).to_iterable_dataset()
    callback = ATPCallback(runs.config(), calibration_dataset=runs.dataset(8), report=False)
    run = runs.trainer(tmp_path, callback, train=stream, max_steps=2)
    run.train()
    assert not any("atp/init_tilt" in entry for entry in run.state.log_history)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_trials": 0},
        {"init_ranking": "block"},
        {"compensate": "none"},
    ],
)
def test_nothing_is_tried_where_there_is_nothing_to_try(changes, tmp_path, monkeypatch) -> None:
    def refuse(*_args) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(PruningRun, "_on_trial", refuse)
    run = runs.trainer(tmp_path, runs.config(**changes), max_steps=2)
    run.train()
    assert not any("atp/init_tilt" in entry for entry in run.state.log_history)


def test_a_recipe_has_trials_for_those_who_may_start_where_they_like() -> None:
    assert ATPConfig().init_trials == 0
    asked = ATPConfig(init_trials=7)
    assert strategy_config("atp", asked).init_trials == 7
    assert strategy_config("prune-then-tune:surgeon", asked).init_trials == 7
    assert strategy_config("prune-then-tune:flap", asked).init_trials == 0
