"""Runs that are watched. Oracles: the same run unwatched, bit for bit; the run's own exported model."""

import dataclasses
import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback

from atp import ATPCallback
from atp.evaluation import flops_per_token
from atp.journal import JOURNAL
from atp.trackers import IMAGE, heat_map
from tests import runs, tiny

EVALUATION = runs.dataset(8, seed=5)


def journal(folder, kind):
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    return [(line["step"], line[kind]) for line in lines if kind in line]


def steps_logged(folder):
    return {step: log for step, log in journal(folder, "log") if "loss" in log}


def watched(folder, config=None, held_out=EVALUATION, **arguments):
    callback = ATPCallback(config or runs.config(**runs.LATE), held_out_dataset=held_out, report=False)
    run = runs.trainer(folder, callback, **arguments)
    run.train()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that begins to prune after two of ten steps and freezes after six."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, watched(folder, dataclasses.replace(runs.config(**runs.LATE), distill=0.0))


def test_watching_changes_nothing(tmp_path):
    settings = {"evaluation": EVALUATION, "eval_strategy": "steps", "eval_steps": 2}
    plain = runs.trainer(tmp_path / "plain", runs.config(**runs.LATE))
    plain.train()
    seen = watched(tmp_path / "seen", **settings)
    assert runs.same(runs.adapter(plain), runs.adapter(seen))
    for run in (plain, seen):
        run.decision = runs.callback_of(run).learner.decision(final=True)
    assert runs.same(plain.decision, seen.decision)


def test_dense_before_the_first_step_is_the_base_model_and_pruned_at_the_end_the_exported_one(finished):
    folder, _ = finished
    held_out = journal(folder, "held_out")
    assert [(step, found["dense"] is None, found["pruned"] is None) for step, found in held_out] == [
        (0, False, True),
        (6, False, True),
        (6, True, False),
        (10, True, False),
    ]
    batch = {key: torch.tensor(EVALUATION[key]) for key in ("input_ids", "labels")}
    for model, (_, found), which in (
        (tiny.model(), held_out[0], "dense"),
        (AutoModelForCausalLM.from_pretrained(folder / "pruned"), held_out[-1], "pruned"),
    ):
        with torch.no_grad():
            assert found[which] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        assert found["rows"] == len(EVALUATION)


def test_the_journal_tells_what_is_kept(finished):
    folder, run = finished
    callback, space = runs.callback_of(run), runs.callback_of(run).learner.space
    ((_, plan),) = journal(folder, "run")
    assert plan["sizes"] == {"kv": [2] * 4, "mlp": [48] * 4}
    assert plan["blocks"] == {"kv": [0, 1, 2, 3], "mlp": [0, 1, 2, 3]}
    assert (plan["start_step"], plan["freeze_step"], plan["total_steps"]) == (2, 6, 10)
    assert plan["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    logs, kept = steps_logged(folder), journal(folder, "kept")
    assert [step for step, _ in kept] == [*range(3, 11), 10]
    decision = callback.learner.decision(final=True)
    assert kept[-1][1] == {
        kind: [int(decision[s.name].sum()) for s in space.sets if s.kind == kind] for kind in ("kv", "mlp")
    }
    removed = space.prunable_parameters - callback.summary()["kept_parameters"]
    assert logs[10]["atp/parameters"] == plan["parameters"] - removed
    head = tiny.model().lm_head.weight.numel()
    left = (callback.summary()["kept_parameters"] + head) / (space.prunable_parameters + head)
    assert (logs[1]["atp/flops_share"], logs[10]["atp/flops_share"]) == (1.0, pytest.approx(left))
    assert [logs[step]["atp/budget"] for step in (1, 3, 10)] == [0.0, 0.4, 0.4]


@pytest.mark.parametrize("tied", [False, True])
def test_what_hidden_takes_from_embedding_head_and_norms_is_told(tied, tmp_path):
    """Oracle: the exported model."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(tiny.model(tie_word_embeddings=tied), lora)
    watched(tmp_path, runs.config(**runs.LATE, space="hidden"), held_out=None, model=model)
    exported, last = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), steps_logged(tmp_path)[10]
    assert last["atp/parameters"] == exported.num_parameters()
    assert last["atp/flops_share"] == pytest.approx(flops_per_token(exported) / flops_per_token(tiny.model()))


def test_held_out_figures_are_logged_once(finished):
    folder, _ = finished
    logs, held_out = steps_logged(folder), journal(folder, "held_out")
    found = {step: log["atp/held_out_dense"] for step, log in logs.items() if "atp/held_out_dense" in log}
    assert found == {1: held_out[0][1]["dense"], 7: held_out[1][1]["dense"]}
    found = {step: log["atp/held_out_pruned"] for step, log in logs.items() if "atp/held_out_pruned" in log}
    assert found == {7: held_out[2][1]["pruned"]}


def test_entropy_and_norms_are_logged_where_they_mean_something(finished):
    folder, run = finished
    logs = steps_logged(folder)
    assert ["atp/entropy" in logs[step] for step in (1, 2, 3, 6, 7, 10)] == [False, False, True, True, False, False]
    assert 0 < logs[3]["atp/entropy"] < 1
    learner = runs.callback_of(run).learner
    mlp = [s.name for s in learner.space.sets if s.kind == "mlp"]
    decision, norms = learner.decision(final=True), []
    for block, name in enumerate(mlp):
        for part, weight, dim in (("gate_proj", "lora_B", 1), ("up_proj", "lora_B", 1), ("down_proj", "lora_A", 0)):
            layer = getattr(learner.attachment.modules[f"model.layers.{block}.mlp.{part}"], weight)["default"]
            norms.append(layer.weight.norm(dim=dim)[decision[name] == 0])
    assert logs[10]["atp/lora_norm_mlp_pruned"] == pytest.approx(torch.cat(norms).mean().item(), rel=1e-5)


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 8


def test_a_resumed_run_has_the_journal_of_an_uninterrupted_one(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = tmp_path / "whole"
    watched(whole, **settings)
    runs.trainer(
        tmp_path / "cut", ATPCallback(runs.config(**runs.LATE), held_out_dataset=EVALUATION, report=False),
        callbacks=(_Stop(),), **settings,
    ).train()  # fmt: skip
    again = ATPCallback(runs.config(**runs.LATE), held_out_dataset=EVALUATION, report=False)
    runs.trainer(tmp_path / "cut", again, **settings).train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-4"))
    for kind in ("run", "kept", "held_out"):
        assert journal(tmp_path / "cut", kind) == journal(whole, kind)
    steps = [step for step, _ in journal(tmp_path / "cut", "log")]
    assert all(a <= b for a, b in pairwise(steps))


def test_that_tuning_harms_is_told_after_a_resume_too(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atp.training.alerts.SPOILT_NATS", 0.0)  # ten steps of a tiny model do not do much harm
    few_words = torch.randint(2, 12, (120, 12), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.05}
    settings["train"] = Dataset.from_dict({"input_ids": few_words, "labels": few_words})
    one, another = (ATPCallback(runs.config(**runs.LATE), held_out_dataset=EVALUATION, report=False) for _ in range(2))
    runs.trainer(tmp_path, one, callbacks=(_Stop(),), **settings).train()
    (said,) = journal(tmp_path, "alert")
    before, at_freeze = (found["dense"] for _, found in journal(tmp_path, "held_out")[:2])
    assert (said[0], said[1]["name"], said[1]["value"]) == (7, "spoilt", at_freeze)
    assert at_freeze > before
    caplog.clear()
    runs.trainer(tmp_path, another, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert journal(tmp_path, "alert") == [said]
    assert f"atp: {said[1]['message']}" in caplog.messages


@pytest.mark.parametrize("what", ["warn", "stop"])
def test_an_alert_is_said_once_and_may_end_training(tmp_path, caplog, what):
    unreachable = runs.config(**runs.OFF_BUDGET, on_alert=what)
    with caplog.at_level(logging.WARNING):
        run = watched(tmp_path, unreachable, None, save_strategy="steps", save_steps=100)
    said = [message for message in caplog.messages if "is asked, and the freeze" in message]
    assert len(said) == 1
    ((step, alert),) = journal(tmp_path, "alert")
    assert (alert["name"], alert["message"]) == ("budget", said[0].removeprefix("atp: "))
    assert run.state.global_step == (runs.STEPS if what == "warn" else step)
    assert (tmp_path / f"checkpoint-{step}" / "atp").is_dir() == (what == "stop")
    assert (tmp_path / "pruned" / "config.json").is_file()


def test_what_an_alert_has_stopped_is_saved_whatever_the_evaluation_says(tmp_path):
    """`save_strategy="best"` decides anew after an evaluation, which comes at the same step."""
    stops = runs.config(**runs.OFF_BUDGET, on_alert="stop")
    settings = {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    run = watched(tmp_path, stops, evaluation=runs.dataset(8, seed=3), **settings)
    step = run.state.global_step
    assert step < runs.STEPS
    assert (tmp_path / f"checkpoint-{step}" / "atp").is_dir()


def test_tensorboard_gets_figures_and_an_image(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    watched(tmp_path / "run", report_to="tensorboard")
    (events,) = (file.parent for file in (tmp_path / "tb").rglob("events*"))
    read = EventAccumulator(str(events))
    read.Reload()
    assert IMAGE in read.Tags()["images"]
    assert {"train/atp/entropy", "train/atp/held_out_dense", "train/atp/churn"} <= set(read.Tags()["scalars"])


def test_the_image_is_darker_where_more_is_kept():
    image = heat_map({"hidden": [1.0], "mlp": [0.0, 0.5, 1.0]})
    assert image.dtype == np.uint8
    brightness = image.astype(int).sum(-1)
    assert len(np.unique(brightness[:, 0])) == 1
    assert brightness[0, -1] > brightness[len(image) // 2, -1] > brightness[-1, -1]


def test_a_script_without_the_command_gets_its_page(tmp_path):
    callback = ATPCallback(runs.config(), held_out_dataset=EVALUATION)
    runs.trainer(tmp_path, callback).train()
    assert json.loads((tmp_path / "metrics.json").read_text())["pruning"]["sparsity_asked"] == 0.4
    assert "<html" in (tmp_path / "report.html").read_text()


def test_copies_that_peft_trains_whole_are_no_parameters_of_the_model(tmp_path):
    run = watched(tmp_path, held_out=None, model=runs.peft_model(modules_to_save=["lm_head"]))
    ((_, plan),) = journal(tmp_path, "run")
    assert plan["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert runs.callback_of(run).learner.frozen
