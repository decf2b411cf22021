"""Named strategies. Oracles: the fields of `ATPConfig` that each name promises, and the criteria that there are."""

import dataclasses

import pytest

from atp.config import CRITERIA, RANKINGS, ATPConfig
from atp.errors import ConfigError
from atp.strategies import FREEZE_AT, is_two_stage, known_strategies, method_of, strategy_config, timing_of

REFIT = {"refit_rows": 9, "refit_first_tokens": 11, "reader_rounds": 2}
BASE = ATPConfig(sparsity=0.3, space="disp", round_to=4, seed=7, calibration_rows=5, noise=0.9, freeze_at=0.8, **REFIT)
TASK = (
    *("sparsity", "space", "uniform", "round_to", "seed", "calibration_rows", "calibration_batch_size"),
    *("refit_rows", "refit_first_tokens", "reader_rounds"),
)


def task(config):
    return [getattr(config, name) for name in TASK]


def test_dense_prunes_nothing_and_atp_is_the_recipe():
    assert strategy_config("dense", BASE) is None
    assert strategy_config("atp", BASE) == BASE
    assert method_of("atp") == "atp"


def test_logits_differs_from_atp_in_the_decision_alone():
    assert strategy_config("logits", BASE) == dataclasses.replace(BASE, decision="logits")


def test_paper_keeps_the_task_and_nothing_else():
    config = strategy_config("paper", BASE)
    assert task(config) == task(BASE)
    assert dataclasses.replace(config, **{name: getattr(ATPConfig(), name) for name in TASK}) == ATPConfig.paper()


@pytest.mark.parametrize("timing", FREEZE_AT)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_runs_at_every_timing_on_the_same_task(timing, criterion):
    config = strategy_config(f"{timing}:{criterion}", BASE)
    assert (config.decision, config.init, config.protect) == ("criterion", criterion, None)
    assert config.freeze_at == {"prune-then-tune": 0.0, "tune-prune-recover": 0.5, "tune-then-prune": 1.0}[timing]
    assert task(config) == task(BASE)
    assert config.noise == ATPConfig().noise
    assert timing_of(f"{timing}:{criterion}") == timing
    assert is_two_stage(f"{timing}:{criterion}/global")
    assert method_of(f"{timing}:{criterion}/global") == f"{criterion}/global"


def test_rankings_are_the_authors_unless_named():
    assert strategy_config("prune-then-tune:flap", BASE).init_ranking == "standard"
    assert strategy_config("prune-then-tune:magnitude", BASE).init_ranking == "block"
    for ranking in RANKINGS:
        assert strategy_config(f"tune-then-prune:flap/{ranking}", BASE).init_ranking == ranking


def test_compensation_is_the_authors_unless_named():
    assert strategy_config("prune-then-tune:flap", BASE).compensate == "bias"
    assert strategy_config("prune-then-tune:activation", BASE).compensate == "none"
    assert strategy_config("prune-then-tune:activation+weights", BASE).compensate == "weights"
    both = strategy_config("prune-then-tune:flap/block+none", BASE)
    assert (both.init_ranking, both.compensate) == ("block", "none")


def test_a_criterion_without_an_entry_runs_with_defaults_and_ranks_as_the_recipe_says(monkeypatch):
    monkeypatch.setattr("atp.strategies.CRITERION_SETTINGS", {})
    chosen = dataclasses.replace(BASE, init="flap", init_ranking="block", init_floor=0.8, lasso=0.3)
    found = strategy_config("prune-then-tune:flap", chosen)
    assert (found.init_ranking, found.init_floor, found.lasso) == ("block", 0.8, ATPConfig().lasso)
    found = strategy_config("prune-then-tune:flap", dataclasses.replace(chosen, init="activation"))
    assert (found.init_ranking, found.init_floor) == (ATPConfig().init_ranking, ATPConfig().init_floor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prune-then-tune:magnitud", "did you mean 'prune-then-tune:magnitude'?"),
        ("prun-then-tune:flap", "did you mean 'prune-then-tune:flap'?"),
        ("prune-then-tune", "did you mean 'prune-then-tune:"),
        ("danse", "did you mean 'dense'?"),
        ("dense:flap", "did you mean"),
        ("paper/global", "did you mean 'paper'?"),
        ("tune-then-prune:flap/globel", "use one of block, global, standard"),
        ("tune-then-prune:flap+wieghts", "use one of auto, follow, weights, bias, none"),
    ],
)
def test_unknown_names_are_one_line_that_helps(name, message):
    with pytest.raises(ConfigError) as caught:
        strategy_config(name, BASE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_one_stage_strategies_are_no_rivals():
    assert [name for name in known_strategies() if not is_two_stage(name)] == ["dense", "atp", "logits", "paper"]
    assert {timing_of(name) for name in ("atp", "logits", "paper")} == {"one stage"}
