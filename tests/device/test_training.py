"""Runs on the second device. Oracle: the same runs on the CPU."""

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from atp import load
from tests import runs
from tests.device import in_its_own_process

pytestmark = in_its_own_process

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "distilled": runs.LATE,
    "alternating": {"mode": "alternating"},
    "sometimes": {"generator_every": 2},
    "eager": {"impl": "eager"},
    "logits": {"decision": "logits"},
    "disp": {"space": "disp"},
    "width+depth": {"space": "width+depth"},
    "hidden": {"space": "hidden"},
    "a rival's": {"decision": "criterion", "init": "flap", "compensate": "bias", "freeze_at": 0.0},
    "the paper's": {"init": "ones", "compensate": "none", "on_budget": False, "mode": "alternating"},
    "off budget": runs.OFF_BUDGET,
}


def outcome(run):
    """Losses, what is decided, and logits of what is written."""
    summary = runs.callback_of(run).summary()
    decision = {name: mask.tolist() for name, mask in runs.callback_of(run).learner.decision(final=True).items()}
    ids = torch.tensor(runs.dataset(2)["input_ids"])
    with torch.no_grad():
        logits = load(f"{run.args.output_dir}/pruned")(ids).logits
    return runs.losses(run), summary, decision, logits


def started(folder, settings, use_cpu=False, **arguments):
    evaluation = {"evaluation": runs.dataset(8, seed=3), "eval_strategy": "steps", "eval_steps": 5}
    arguments |= evaluation | {"use_cpu": use_cpu, "dataloader_pin_memory": False}
    return runs.trainer(folder, runs.config(**settings), **arguments)


@pytest.fixture
def on_cpu(tmp_path):
    """What a run on the CPU gives; to be asked for before the device."""

    def run(settings, **arguments):
        made = started(tmp_path / "cpu", settings, use_cpu=True, **arguments)
        made.train()
        return outcome(made)

    return run


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_is_what_it_is_on_the_cpu(settings, on_cpu, request, tmp_path):
    expected = on_cpu(settings)
    request.getfixturevalue("device")
    run = started(tmp_path / "second", settings)
    run.train()
    assert next(run.model.parameters()).device.type == "second"
    agree(outcome(run), expected)


class Killed(TrainerCallback):
    """Ends a run in the middle."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{}, {"freeze_at": 0.4}], ids=["learning", "final"])
def test_a_run_goes_on_from_its_checkpoint(settings, on_cpu, request, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 5}
    expected = on_cpu(settings, **saves)
    request.getfixturevalue("device")
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path / "second", settings, callbacks=(Killed(),), **saves).train()
    run = started(tmp_path / "second", settings, **saves)
    run.train(resume_from_checkpoint=True)
    agree(outcome(run), expected)


def agree(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1] == expected[1]
    assert found[2] == expected[2]
    torch.testing.assert_close(found[3], expected[3], rtol=1e-3, atol=1e-4)
