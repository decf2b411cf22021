"""The callback in an unmodified Trainer. Oracles: the same run done another way, and the exported folder."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from atp import ATPCallback, load
from atp.callback import _gathered_adapters, _trained_whole
from atp.cli import main
from atp.errors import (
    ATPError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    DivergedError,
    UnsupportedModelError,
)
from atp.layers import attach, attachment_of
from atp.models import load_model
from atp.recipe import TWO_NAMES
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import base_layer, is_quantised
from atp.training import calibration, refitting, state
from atp.training.run import TEACHER
from atp.training.supported import require_shards_that_come_and_go, require_what_can_be_followed
from tests import families, runs, tiny

WAYS = [
    *(("joint", "width"), ("joint", "disp"), ("alternating", "width"), ("alternating", "disp")),
    *(("joint", "depth"), ("joint", "hidden"), ("joint", "values"), ("alternating", "width+hidden+depth")),
]


def decision(run: Any) -> dict[str, torch.Tensor]:
    return runs.callback_of(run).learner.attachment.decision()


@pytest.mark.parametrize("wanted", [0, 30])
def test_the_final_refit_looks_at_one_token_inputs_too(tmp_path: Path, wanted: int) -> None:
    run, alone = runs.trainer(tmp_path, runs.config(refit_first_tokens=wanted)), []
    run.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: alone.extend(kwargs["input_ids"] if kwargs["input_ids"].shape[1] == 1 else ()),
        with_kwargs=True,
    )
    run.train()
    assert len(alone) == wanted


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_final_refit_takes_as_many_rounds_as_asked(tmp_path: Path, rounds: int, monkeypatch) -> None:
    taken, one_round = [], refitting._round
    monkeypatch.setattr(refitting, "_round", lambda *args: taken.append(len(args)) or one_round(*args))
    run = runs.trainer(tmp_path, runs.config(reader_rounds=rounds))
    run.train()
    by_a_draw, by_all = 2, 3  # arguments
    blocks = len(runs.callback_of(run).learner.space.structure.blocks)
    assert taken == ([by_a_draw] * (rounds - 1) + [by_all]) * blocks


@pytest.mark.parametrize(("mode", "space"), WAYS)
def test_run_leaves_a_smaller_model_that_computes_what_the_masked_one_did(
    tmp_path: Path, mode: str, space: str
) -> None:
    run = runs.trainer(tmp_path, runs.config(mode=mode, space=space))
    run.train()
    summary = runs.callback_of(run).summary()
    assert summary["frozen_at_step"] == 6
    one_step = {"depth": 0.08, "hidden": 4 / 32}.get(space, 0.02)  # a whole MLP of four; as many dimensions as heads
    assert 0 <= summary["sparsity"] - 0.4 <= one_step
    ids = torch.randint(2, 384, (2, 9))
    run.model.eval()
    with torch.no_grad():
        masked = run.model(input_ids=ids).logits
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")(input_ids=ids).logits
    assert (pruned - masked).norm() / masked.norm() <= 1e-5
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "atp",
    ]


def test_uniform_run_leaves_a_stock_model(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config(uniform=True))
    run.train()
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert type(pruned) is LlamaForCausalLM
    assert sorted(p.name for p in (tmp_path / "pruned").glob("*.py")) == []
    assert pruned.config.intermediate_size < 48
    masks = decision(run)
    assert len({int(mask.sum()) for name, mask in masks.items() if name.endswith(".mlp")}) == 1
    assert len({tuple(mask.tolist()) for name, mask in masks.items() if name.endswith(".mlp")}) > 1, "each its own"


def test_nothing_is_pruned_before_the_start_and_the_teacher_is_the_model_of_then(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config(**runs.LATE), save_strategy="steps", save_steps=2)
    run.train()
    steps = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    assert [steps[step]["atp/sparsity"] for step in (1, 2)] == [0.0, 0.0]
    assert all(0.4 <= steps[step]["atp/sparsity"] <= 0.42 for step in range(3, 11))
    assert [step for step in steps if "atp/teacher_kl" in steps[step]] == list(range(3, 11))
    then = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    tensors, _ = state.load_state(tmp_path / "checkpoint-8" / state.FOLDER)
    teacher = {k.removeprefix("base_model.model."): v for k, v in then.items()}
    assert runs.same({k.replace(".default", ""): v for k, v in state.under(tensors, TEACHER).items()}, teacher)
    assert not state.under(state.load_state(tmp_path / "final" / state.FOLDER)[0], TEACHER), "of no use any more"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())


def test_distillation_pulls_towards_the_teacher(tmp_path: Path) -> None:
    distances = []
    for distill in (0.0, 20.0):
        config = runs.config(start_at=0.2, freeze_at=0.2, distill=distill)
        run = runs.trainer(tmp_path / str(distill), config, max_steps=40, learning_rate=1e-2)
        run.train()
        teacher = runs.trainer(tmp_path / "dense", None, max_steps=40, learning_rate=1e-2, callbacks=(StopAt(8),))
        teacher.train()
        ids = torch.tensor(runs.dataset(16, seed=9)["input_ids"])
        with torch.no_grad():
            p, q = (r.model.eval()(input_ids=ids).logits.log_softmax(-1) for r in (teacher, run))
        distances.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert distances[1] < 0.7 * distances[0]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_generator_steps_only_every_k(tmp_path: Path) -> None:
    for mode in ("joint", "alternating"):
        run = runs.trainer(tmp_path, runs.config(mode=mode, generator_every=4))
        run.train()
        optimizer = runs.callback_of(run).learner.optimizer
        assert {int(moments["step"]) for moments in optimizer.state.values()} == {2}, "steps 0 and 4 of 6"


@pytest.mark.parametrize("late", [{}, runs.LATE], ids=["", "late"])
@pytest.mark.parametrize(("mode", "space"), WAYS)
def test_resumed_equals_uninterrupted(tmp_path: Path, mode: str, space: str, late: dict[str, float]) -> None:
    """Cut around the start (step 2 where late) and the freeze (6 of 10), with dropout and accumulation."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    cfg = runs.config(mode=mode, space=space, **late)
    whole = runs.trainer(tmp_path / "whole", cfg, model=runs.peft_model(dropout=0.1), **settings)
    whole.train()
    for cut in (1, 2, 4, 6, 8):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", folder / f"checkpoint-{cut}")
        torch.manual_seed(999)
        resumed = runs.trainer(folder, cfg, model=runs.peft_model(dropout=0.1), **settings)
        resumed.train(resume_from_checkpoint=True)
        assert runs.same(runs.adapter(resumed), runs.adapter(whole)), f"adapter differs after a cut at {cut}"
        assert runs.same(decision(resumed), decision(whole)), f"decision differs after a cut at {cut}"


@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_resumed_equals_uninterrupted_after_an_evaluation(tmp_path: Path, mode: str) -> None:
    """It leaves the model in evaluation mode, without dropout, where a decision comes next; a resumed run does not."""
    cfg = runs.config(mode=mode, **(runs.LATE | {"distill": 0.0}))
    settings = {"evaluation": runs.dataset(8, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = runs.trainer(tmp_path / "whole", cfg, model=runs.peft_model(dropout=0.3), **settings)
    whole.train()
    for cut in (2, 6):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", folder / f"checkpoint-{cut}")
        resumed = runs.trainer(folder, cfg, model=runs.peft_model(dropout=0.3), **settings)
        resumed.train(resume_from_checkpoint=True)
        assert runs.same(runs.adapter(resumed), runs.adapter(whole)), f"adapter differs after a cut at {cut}"
        assert runs.same(decision(resumed), decision(whole)), f"decision differs after a cut at {cut}"


def test_a_generator_step_without_labels_is_no_alarm(tmp_path: Path) -> None:
    rows = runs.dataset(16, seed=1).to_list()
    for row in rows[4:8]:  # of the second step's batch
        row["labels"] = [-100] * len(row["labels"])
    callback = ATPCallback(runs.config(mode="alternating"), calibration_dataset=rows, report=False)
    run = runs.trainer(tmp_path, callback)
    run.train()
    losses = [entry["atp/generator_loss"] for entry in run.state.log_history if "atp/generator_loss" in entry]
    assert losses
    assert all(map(math.isfinite, losses))
    assert 0.0 in losses


@pytest.mark.parametrize("late", [{}, runs.LATE], ids=["", "late"])
@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_accumulation_4x2_equals_1x8(tmp_path: Path, mode: str, late: dict[str, float]) -> None:
    cfg = runs.config(mode=mode, calibration_rows=8, **late)
    one = runs.trainer(tmp_path / "a", cfg, per_device_train_batch_size=8)
    one.train()
    four = runs.trainer(tmp_path / "b", cfg, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    four.train()
    assert runs.same(decision(one), decision(four))
    assert runs.worst(runs.adapter(four), runs.adapter(one)) < 1e-3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # its name until 5.22
@pytest.mark.parametrize("late", [{}, runs.LATE], ids=["", "late"])
@pytest.mark.parametrize("mode", ["joint", "alternating"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, mode: str, late: dict[str, float], dropout: float
) -> None:
    cfg = runs.config(mode=mode, **late)
    plain = runs.trainer(tmp_path / "a", cfg, model=runs.peft_model(dropout))
    plain.train()
    checkpointed = runs.trainer(tmp_path / "b", cfg, model=runs.peft_model(dropout), gradient_checkpointing=True)
    checkpointed.train()
    assert runs.same(decision(plain), decision(checkpointed))
    assert runs.worst(runs.adapter(checkpointed), runs.adapter(plain)) < 1e-3


@pytest.mark.parametrize("quiet", [False, True])
def test_what_takes_long_shows_how_far_it_is(tmp_path: Path, quiet: bool, capfd: pytest.CaptureFixture[str]) -> None:
    runs.trainer(tmp_path, runs.config(init="surgeon", compensate="follow"), disable_tqdm=quiet).train()
    shown = capfd.readouterr().err
    for bar in ("surgeon scores", "rows to refit to", "refitting blocks"):
        assert (f"atp: {bar}: " in shown) is not quiet


def test_evaluating_and_logging_leave_the_run_bitwise_as_it_was(tmp_path: Path) -> None:
    """No dropout here: torch's evaluation loader itself draws one global random number."""
    quiet = runs.trainer(tmp_path / "a", runs.config(), logging_strategy="no")
    quiet.train()
    watched = runs.trainer(
        tmp_path / "b",
        runs.config(),
        evaluation=runs.dataset(8, seed=7),
        eval_strategy="steps",
        eval_steps=2,
    )
    watched.train()
    assert runs.same(runs.adapter(quiet), runs.adapter(watched))
    assert runs.same(decision(quiet), decision(watched))


def test_callback_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    """The last random number a run draws is the same with and without us: data order and dropout are untouched."""
    draws = []
    for atp in (None, runs.config(mode="alternating")):
        run = runs.trainer(tmp_path, atp, model=runs.peft_model(dropout=0.1))
        run.train()
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


class Seen(TrainerCallback):
    """Collects the rows that reach the model."""

    def __init__(self) -> None:
        self.rows: set[tuple[int, ...]] = set()

    def watch(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.rows |= {tuple(row) for row in kwargs["input_ids"].tolist()}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            model.register_forward_pre_hook(self.watch, with_kwargs=True)


def test_held_out_rows_never_reach_lora(tmp_path: Path) -> None:
    """Three whole epochs see every row but the held-out ones, in as many steps as without us."""
    seen, data = Seen(), runs.dataset(60)
    run = runs.trainer(
        tmp_path, runs.config(calibration_rows=6), train=data, callbacks=(seen,), max_steps=-1, num_train_epochs=3
    )
    run.train()
    calibration = runs.callback_of(run)._running().calibration
    assert calibration is not None
    held = {tuple(row["input_ids"]) for row in calibration._rows}
    assert len(held) == 6
    assert seen.rows == {tuple(row) for row in data["input_ids"]} - held
    assert run.state.global_step == 3 * 15


def test_metrics_reach_the_log_and_trackers_that_log_first(tmp_path: Path) -> None:
    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.logs: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.logs.append(dict(logs))

    tracker = Tracker()
    run = runs.trainer(tmp_path, runs.config())
    run.callback_handler.callbacks.insert(1, tracker)  # where TensorBoard's callback stands: before the user's
    run.train()
    wanted = {"sparsity", "churn", "temperature", "kept_kv", "kept_mlp", "budget_loss", "frozen"}
    for logs in (tracker.logs, run.state.log_history):
        trained = [entry for entry in logs if "loss" in entry]
        assert len(trained) == runs.STEPS
        assert all({f"atp/{name}" for name in wanted} <= entry.keys() for entry in trained)
        assert trained[-1]["atp/frozen"] == 1.0


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = runs.trainer(tmp_path, runs.config(), report_to="tensorboard")
    run.train()
    events = [p.parent for p in tmp_path.rglob("events.out.tfevents*")]
    read = accumulator.EventAccumulator(str(events[0]))
    read.Reload()
    assert "train/atp/sparsity" in read.Tags()["scalars"]


@pytest.mark.parametrize(("rows", "wanted"), [(8, 4), (3, 3)])
def test_calibration_passes_are_no_larger_than_training_steps(tmp_path: Path, rows: int, wanted: int) -> None:
    atp = runs.config(calibration_batch_size=None, calibration_rows=rows)
    run = runs.trainer(tmp_path, atp, max_steps=1, per_device_train_batch_size=4)
    run.train()
    assert len(runs.callback_of(run)._running().calibration.batch(0)["input_ids"]) == wanted


class WorseAndWorse(TrainerCallback):
    """A metric that falls with every step, so that the first evaluation stays the best."""

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        kwargs["metrics"]["eval_score"] = -float(state.global_step)


def test_early_stopping_and_best_model(tmp_path: Path) -> None:
    """The best checkpoint lies before the freeze: its decision comes back, frozen on budget, and is exported."""
    run = runs.trainer(
        tmp_path,
        runs.config(freeze_at=1.0),
        evaluation=runs.dataset(8, seed=7),
        callbacks=(WorseAndWorse(), EarlyStoppingCallback(early_stopping_patience=1)),
        metric_for_best_model="eval_score",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    assert run.state.global_step == 4
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    learner = runs.callback_of(run).learner
    assert learner.step == 1
    assert abs(learner.space.sparsity(decision(run)) - 0.4) < 0.02
    assert (tmp_path / "pruned" / "config.json").exists()


@pytest.mark.parametrize("late", [{}, runs.LATE], ids=["", "late"])
def test_bf16_autocast_and_torch_compile(tmp_path: Path, late: dict[str, float]) -> None:
    plain = runs.trainer(tmp_path / "a", runs.config(**late), max_steps=4)
    plain.train()
    compiled = runs.trainer(
        tmp_path / "b", runs.config(**late), max_steps=4, torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.train()
    assert runs.worst(runs.adapter(compiled), runs.adapter(plain)) < 1e-3
    half = runs.trainer(tmp_path / "c", runs.config(**late), bf16=True)
    half.train()
    assert all(p.dtype == torch.float32 for p in runs.callback_of(half).learner.generator.parameters())
    assert math.isfinite(half.state.log_history[-2]["loss"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("space", ["width", "disp"])
def test_quantised_base_weights_stay_so_and_the_export_is_what_was_trained(
    tmp_path: Path, bits: int, space: str
) -> None:
    """QLoRA, with evaluations between. Oracle: the live masked model; int8 kernels round what they read, too."""
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"), dtype="float32", bits=bits)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    settings = {"evaluation": runs.dataset(8, seed=5), "eval_strategy": "steps", "eval_steps": 4}
    run = runs.trainer(tmp_path, runs.config(space=space, start_at=0.2), model=model, **settings)
    run.train()
    assert all(is_quantised(base_layer(m)) for m in runs.callback_of(run).learner.attachment.modules.values())
    ids = torch.arange(2, 14)[None]
    pruned = load(tmp_path / "pruned")
    with torch.no_grad():
        expected, found = run.model.train()(input_ids=ids).logits, pruned(input_ids=ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < (1e-5 if bits == 4 else 2e-2)
    assert "quantization_config" not in pruned.config.to_dict()


def test_train_begin_may_fire_twice(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config())
    set_seed(0)
    run.train()
    first = runs.adapter(run), decision(run)
    model = runs.peft_model()
    run.model = run.model_wrapped = run.callback_handler.model = model
    run.optimizer = run.lr_scheduler = None
    set_seed(0)
    run.train()
    assert runs.same(runs.adapter(run), first[0])
    assert runs.same(decision(run), first[1])


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (UnsupportedModelError, "has no LoRA", lambda f: runs.trainer(f, runs.config(), model=tiny.model())),
        (
            UnsupportedModelError,
            "on none of the linear layers",
            lambda f: runs.trainer(f, runs.config(), model=runs.peft_model(target_modules=["lm_head"])),
        ),
        (BudgetError, "cannot be reached", lambda f: runs.trainer(f, runs.config(sparsity=0.99))),
        (ATPError, "round_to=4096 is larger", lambda f: runs.trainer(f, runs.config(round_to=4096))),
        (CalibrationError, "too few to hold out", lambda f: runs.trainer(f, runs.config(), train=runs.dataset(20))),
        (
            CalibrationError,
            "fewer than calibration_batch_size",
            lambda f: runs.trainer(f, ATPCallback(runs.config(), calibration_dataset=runs.dataset(0))),
        ),
        (
            CalibrationError,
            "is also a calibration row",
            lambda f: runs.trainer(
                f,
                ATPCallback(runs.config(), calibration_dataset=runs.dataset(8, seed=5)),
                evaluation=runs.dataset(8, seed=5),
                eval_strategy="steps",
                eval_steps=2,
            ),
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, error: type[Exception], words: str, make: Any) -> None:
    with pytest.raises(error, match=words) as raised:
        make(tmp_path).train()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "pruned").exists()


def test_already_attached_is_refused(tmp_path: Path) -> None:
    model = runs.peft_model()
    attach(model, build_space(discover(model), "width"))
    with pytest.raises(UnsupportedModelError, match="is being pruned already, by another ATPCallback"):
        runs.trainer(tmp_path, runs.config(), model=model).train()


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor")
def test_adapters_that_cannot_be_exported_are_refused_before_training(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config(), model=runs.peft_model(lora_bias=True))
    with pytest.raises(UnsupportedModelError, match=r"q_proj has no bias that lora_bias could be merged into"):
        run.train()
    assert attachment_of(run.model) is None
    assert run.state.global_step == 0
    runs.trainer(tmp_path, runs.config(export=False), model=runs.peft_model(lora_bias=True), max_steps=2).train()


def test_failed_start_leaves_the_model_untouched(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config(), train=runs.dataset(20))
    with pytest.raises(CalibrationError):
        run.train()
    assert attachment_of(run.model) is None


@pytest.mark.parametrize("kind", ["tp_size", "cp_size"])
def test_processes_that_share_the_pass_of_a_row_are_refused(tmp_path: Path, monkeypatch, kind: str) -> None:
    run = runs.trainer(tmp_path, runs.config())
    events = {"model": run.model, "train_dataloader": run.get_train_dataloader()}
    monkeypatch.setattr(AcceleratorState(), "parallelism_config", ParallelismConfig(**{kind: 2}))
    with pytest.raises(UnsupportedModelError, match="tensor, context and sequence parallelism"):
        runs.callback_of(run).on_train_begin(run.args, run.state, run.control, **events)
    assert attachment_of(run.model) is None


@pytest.mark.parametrize("compensate", ["follow", "bias"])
def test_a_run_that_starts_again_in_one_process_starts_from_the_base_model(tmp_path: Path, compensate: str) -> None:
    """As after `auto_find_batch_size` has met too large a batch. Oracle: the run that was not cut."""
    run = runs.trainer(tmp_path, runs.config(start_at=0.4, compensate=compensate), save_strategy="steps", save_steps=2)
    run.train()
    uncut, chosen = runs.adapter(run), decision(run)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert runs.same(runs.adapter(run), uncut)
    assert runs.same(decision(run), chosen)


def test_evaluations_before_the_freeze_do_not_compete_with_those_of_the_pruned_model(tmp_path: Path) -> None:
    """The first evaluation is the best by far, of a model that nobody will get."""
    run = runs.trainer(
        tmp_path,
        runs.config(start_at=0.4),
        evaluation=runs.dataset(8, seed=5),
        callbacks=(WorseAndWorse(),),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-8")
    assert runs.callback_of(run).learner.frozen_at == 6
    entry = next(e for e in run.state.log_history if e.get("step") == 8 and "eval_loss" in e)
    assert f"{entry['eval_loss']:.4g}" in (tmp_path / "pruned" / "README.md").read_text()


@pytest.mark.parametrize("order", [("clean", "shared"), ("shared", "clean")])
def test_every_evaluation_set_is_looked_through_for_calibration_rows(tmp_path: Path, order: tuple[str, str]) -> None:
    sets = {"clean": runs.dataset(8, seed=5), "shared": runs.dataset(8, seed=6)}
    callback = ATPCallback(runs.config(), sets["shared"], report=False)
    run = runs.trainer(
        tmp_path, callback, evaluation={name: sets[name] for name in order}, eval_strategy="steps", eval_steps=2
    )
    with pytest.raises(CalibrationError, match="is also a calibration row"):
        run.train()


def test_the_card_says_nothing_of_an_evaluation_that_saw_no_final_decision(tmp_path: Path) -> None:
    run = runs.trainer(
        tmp_path, runs.config(freeze_at=1.0), evaluation=runs.dataset(8, seed=5), eval_strategy="steps", eval_steps=5
    )
    run.train()
    assert "evaluation set" not in (tmp_path / "pruned" / "README.md").read_text()


def test_an_evaluation_before_the_first_step_sees_the_decision_that_is_refitted_for(tmp_path: Path) -> None:
    """Where pruning begins with the run. Oracle: the first step's masks, of which nothing is drawn at random."""
    callback = ATPCallback(runs.config(start_at=0.0, noise=0.0, noise_end=0.0), report=False)
    kept = []

    class See(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(callback.learner.attachment.decision())

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(callback.learner.attachment.decision())

    run = runs.trainer(
        tmp_path, callback, evaluation=runs.dataset(4, seed=5), callbacks=(See(),), eval_on_start=True, max_steps=4
    )
    run.train()
    assert runs.same(kept[0], kept[1])
    assert any((mask == 0).any() for mask in kept[0].values())


def test_resume_is_refused_with_another_config_world_size_or_damage(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 3}
    runs.trainer(tmp_path, runs.config(), **arguments).train()
    shutil.rmtree(tmp_path / "checkpoint-9")
    shutil.rmtree(tmp_path / "checkpoint-10", ignore_errors=True)

    def resume(**changes: Any) -> None:
        runs.trainer(tmp_path, runs.config(**changes), **arguments).train(resume_from_checkpoint=True)

    with pytest.raises(CheckpointError, match=r"another ATPConfig \(sparsity: 0.4 -> 0.5\)"):
        resume(sparsity=0.5)
    state = tmp_path / "checkpoint-6" / "atp" / "state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps(values | {"world_size": 4}))
    with pytest.raises(CheckpointError, match="4 processes"):
        resume()
    state.write_text(json.dumps(values)[:40])
    with pytest.raises(CheckpointError, match=r"damaged .* resume from .*checkpoint-3"):
        resume()
    tensors = state.with_name("state.safetensors")
    state.write_text(json.dumps(values))
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        resume()
    shutil.rmtree(state.parent)
    with pytest.raises(CheckpointError, match=r"no saved pruning state here: resume from .*checkpoint-3"):
        resume()


def test_nan_stops_before_it_is_applied(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                model.get_input_embeddings().weight.data[:] = float("nan")

    run = runs.trainer(tmp_path, runs.config(), callbacks=(Poison(),), save_strategy="steps", save_steps=2)
    with pytest.raises(DivergedError, match=r"at step 5: nothing was applied .*checkpoint-4"):
        run.train()
    assert all(weight.isfinite().all() for weight in runs.adapter(run).values())
    assert not (tmp_path / "pruned").exists()


def test_an_interrupted_evaluation_leaves_no_checkpoint_that_has_only_our_part(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = runs.trainer(
        tmp_path, runs.config(), evaluation=runs.dataset(8, seed=5), callbacks=(Interrupt(),), **settings
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "journal.jsonl"}
    assert (tmp_path / "checkpoint-2" / "atp" / "state.json").exists()


def test_our_part_of_a_checkpoint_is_there_before_the_trainer_may_remove_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def rotate(output_dir: str, **kwargs: Any) -> None:
        seen.extend((p / "atp" / "state.json").exists() for p in Path(output_dir).glob("checkpoint-*"))

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    runs.trainer(tmp_path, runs.config(), evaluation=runs.dataset(8, seed=5), **settings).train()
    assert len(seen) > 5
    assert all(seen)


def test_a_checkpoint_of_another_folder_is_to_be_named_to_the_callback_too(tmp_path: Path) -> None:
    runs.trainer(tmp_path / "a", runs.config(), save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"b/checkpoint-4 is not there: .*ATPCallback\(resume_from_checkpoint"):
        runs.trainer(tmp_path / "b", runs.config()).train(resume_from_checkpoint=checkpoint)


def test_a_run_goes_on_beside_its_own_base_model_only(tmp_path: Path) -> None:
    runs.trainer(tmp_path, runs.config(), save_strategy="steps", save_steps=4, max_steps=4).train()
    other = runs.peft_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    run = runs.trainer(tmp_path, runs.config(), model=other, max_steps=4)
    with pytest.raises(CheckpointError, match="checkpoint-4: was saved beside another base model"):
        run.train(resume_from_checkpoint=True)


_BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        ({}, {"save_strategy": "steps", "save_steps": runs.STEPS // 2}),
        ({}, {"save_strategy": "epoch", "eval_strategy": "epoch"}),
        ({"freeze_at": 1.0}, {"save_strategy": "steps", "learning_rate": 0.5} | _BEST),
    ],
    ids=["steps", "epochs", "frozen at the end"],
)
def test_a_run_resumed_where_it_ended_changes_nothing_and_exports(
    tmp_path: Path, settings: dict[str, Any], training: dict[str, Any]
) -> None:
    """As after a kill while its model was exported; the Trainer takes one step more."""
    training = training | {"lr_scheduler_type": "constant", "logging_steps": 1}

    def run(name: str) -> Trainer:
        return runs.trainer(tmp_path / name, runs.config(**settings), evaluation=runs.dataset(8, seed=5), **training)

    def times(name: str) -> dict[str, int]:
        kept = (tmp_path / name).glob("checkpoint-*/**/*")
        return {str(p.relative_to(tmp_path / name)): p.stat().st_mtime_ns for p in kept if p.is_file()}

    whole = run("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("final", "pruned"))
    before, cut = times("cut"), run("cut")
    outcome = cut.train(resume_from_checkpoint=True)
    assert outcome.global_step == runs.STEPS
    assert "train_loss" not in outcome.metrics | cut.state.log_history[-1]
    assert [x["loss"] for x in cut.state.log_history if "loss" in x] == [
        x["loss"] for x in whole.state.log_history if "loss" in x
    ]
    assert runs.same(runs.adapter(cut), runs.adapter(whole))
    assert times("cut") == before
    found, expected = (load(tmp_path / name / "pruned") for name in ("cut", "whole"))
    assert runs.same(dict(found.state_dict()), dict(expected.state_dict()))
    states = [json.loads((tmp_path / name / "final" / "atp" / "state.json").read_text()) for name in ("cut", "whole")]
    assert states[0]["step"] == states[1]["step"]


def test_a_machine_with_a_folder_of_its_own_has_random_states_of_its_own_processes(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    runs.trainer(tmp_path, runs.config(), **settings).train()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    values = json.loads((checkpoint / "atp" / "state.json").read_text()) | {"world_size": 2}
    (checkpoint / "atp" / "state.json").write_text(json.dumps(values))
    runs.trainer(tmp_path, runs.config(), save_on_each_node=True)
    assert checkpoint.is_dir()
    runs.trainer(tmp_path, runs.config())
    assert not checkpoint.exists()


def test_only_checkpoints_that_a_kill_cut_short_are_set_aside(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    runs.trainer(tmp_path, runs.config(), **settings).train()
    (tmp_path / "checkpoint-7").mkdir()  # somebody's
    (tmp_path / "checkpoint-2" / "rng_state_1.pth").write_text("of an earlier run with more processes")
    assert state.set_aside_unfinished(tmp_path, plain=True) == []
    for name in ("_unfinished-checkpoint-4", "_unfinished-checkpoint-4-2"):
        state.not_finished_yet(tmp_path / "checkpoint-4")
        assert [p.name for p in state.set_aside_unfinished(tmp_path)] == [name]
        shutil.copytree(tmp_path / name, tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-4")  # killed while ours was written, which comes first
    (tmp_path / "checkpoint-4" / ".atp.99.tmp").mkdir(parents=True)
    assert [p.name for p in state.set_aside_unfinished(tmp_path)] == ["_unfinished-checkpoint-4-3"]


def test_full_disk_while_saving_leaves_no_half_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = state.write_weights

    def full(folder: Path, *rest: Any) -> None:
        if "checkpoint-4" in str(folder):
            (folder / state.TENSORS).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(folder, *rest)

    monkeypatch.setattr(state, "write_weights", full)
    run = runs.trainer(tmp_path, runs.config(), save_strategy="steps", save_steps=2)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.train()
    assert not (tmp_path / "checkpoint-4").exists()  # an empty one could not be resumed from
    assert (tmp_path / "checkpoint-2" / "atp" / "state.json").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import TrainerCallback
from tests import runs

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

runs.trainer(Path(sys.argv[1]), runs.config(), callbacks=(Kill(),), save_strategy="steps", save_steps=2).train()
"""


def test_killed_in_the_middle_of_a_step_resumes_exactly(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=root, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (tmp_path / "cut" / "pruned").exists()
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = runs.trainer(tmp_path / "whole", runs.config(), **settings)
    whole.train()
    resumed = runs.trainer(tmp_path / "cut", runs.config(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert runs.same(runs.adapter(resumed), runs.adapter(whole))
    assert runs.same(decision(resumed), decision(whole))


def test_several_gpus_of_one_process_are_refused(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config())
    run.args._n_gpu = 2
    with pytest.raises(UnsupportedModelError, match="one process sees 2 GPUs: start the script with accelerate launch"):
        run.train()
    run.model.get_base_model().is_loaded_in_4bit = True  # which the Trainer leaves on its own GPU
    assert run.train().global_step > 0


def test_fsdp1_is_refused_by_name(tmp_path: Path) -> None:
    run = runs.trainer(tmp_path, runs.config())
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # which needs processes to be made
    with pytest.raises(UnsupportedModelError, match="set fsdp_version 2"):
        runs.callback_of(run)._space(wrapped)


@pytest.mark.parametrize(
    ("arguments", "space", "message"),
    [
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "width",
            "use_reentrant=True hides gradients that pruning measures: set it to False where",
        ),
        ({"enable_jit_checkpoint": True}, "width", "enable_jit_checkpoint saves within a step"),
        ({"neftune_noise_alpha": 5.0}, "width+hidden", "neftune_noise_alpha adds noise to dimensions"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(tmp_path: Path, arguments, space, message) -> None:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = TWO_NAMES if known.issuperset(TWO_NAMES.values()) else {}
    arguments = {names.get(name, name): value for name, value in arguments.items()}
    with pytest.raises(UnsupportedModelError, match=message):
        runs.trainer(tmp_path, runs.config(space=space), **arguments).train()


def sharded(module: torch.nn.Module) -> None:
    """As FSDP2 makes it, but for its parameters."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module), FSDPModule), {})


@pytest.mark.parametrize(
    ("reshards", "blocks", "message"),
    [
        (True, True, None),
        (False, True, "set fsdp_reshard_after_forward to true"),
        (True, False, "fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP"),
    ],
)
def test_weights_that_stay_whole_between_passes_are_refused(reshards, blocks, message, monkeypatch) -> None:
    model = runs.peft_model()
    for module in [model, *(model.get_base_model().model.layers if blocks else ())]:
        sharded(module)
    known = SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=reshards))
    monkeypatch.setattr("atp.training.supported.AcceleratorState", lambda: known)
    with nullcontext() if message is None else pytest.raises(UnsupportedModelError, match=message):
        require_shards_that_come_and_go(model)


def test_blocks_that_fsdp_has_wrapped_or_compiled_are_refused_by_name() -> None:
    model = runs.peft_model()
    sharded(model)
    model._orig_mod = None
    with pytest.raises(UnsupportedModelError, match="torch_compile is not supported with FSDP2"):
        require_shards_that_come_and_go(model)
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(UnsupportedModelError, match="fsdp_activation_checkpointing puts blocks into others"):
        require_shards_that_come_and_go(model)


def test_adapters_that_are_not_trained_are_saved_where_others_are_in_parts(monkeypatch) -> None:
    model = runs.peft_model()
    model.add_adapter("reference", LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr("atp.callback.is_sharded", lambda _: True)
    assert any(".reference." in name for name in _gathered_adapters(model))


def test_settings_that_are_no_config_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="takes an ATPConfig, not dict"):
        ATPCallback({"sparsity": 0.4})


@pytest.mark.parametrize("export", [True, False])
def test_layers_that_are_trained_whole_and_would_lose_parts_are_refused_before_training(export, tmp_path: Path) -> None:
    for whole in ("down_proj", "mlp"):
        model = runs.peft_model(target_modules=["q_proj"], modules_to_save=[whole])
        with pytest.raises(UnsupportedModelError, match=rf"{whole} is trained whole \(modules_to_save\)"):
            runs.trainer(tmp_path, runs.config(export=export), model=model).train()
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_classifier_is_refused_as_one_and_not_for_its_head_that_is_trained(tmp_path: Path) -> None:
    model = get_peft_model(
        LlamaForSequenceClassification(tiny.model().config), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification is no causal LM"):
        runs.trainer(tmp_path, runs.config(), model=model).train()


def test_layers_that_are_trained_whole_and_held_in_parts_are_refused_too(tmp_path: Path) -> None:
    """ZeRO-3 leaves parameters without a shape of their own."""
    model = runs.peft_model(target_modules=["q_proj"], modules_to_save=["down_proj"])
    for parameter in (p for name, p in model.named_parameters() if "down_proj" in name):
        parameter.ds_shape, parameter.ds_tensor = parameter.shape, parameter.data.flatten()
        parameter.data = torch.empty(0)
    assert "down_proj" in (_trained_whole(model) or "")


def test_an_evaluation_set_may_share_rows_with_the_training_set(tmp_path: Path, caplog) -> None:
    """Among them some that were held out of it; with a calibration set that was given it may not."""
    train, settings = runs.dataset(), {"eval_strategy": "steps", "eval_steps": 5}
    run = runs.trainer(tmp_path / "a", runs.config(), train=train, evaluation=train, **settings)
    assert run.train().global_step == runs.STEPS
    assert caplog.text.count("is a training row too") == 1
    given = ATPCallback(runs.config(), calibration_dataset=train.select(range(8)), report=False)
    with pytest.raises(CalibrationError, match="evaluation row 0 is also a calibration row"):
        runs.trainer(tmp_path / "b", given, train=train, evaluation=train, **settings).train()


def test_patience_begins_anew_when_pruning_does(tmp_path: Path) -> None:
    """Else evaluations of the dense model would win over those of the pruned one before it has learned."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "evaluation": runs.dataset(8, seed=3)}
    best = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            best.append(state.best_metric)

    run = runs.trainer(tmp_path, runs.config(**runs.LATE), callbacks=(Watch(),), **settings)
    run.train()
    begins = [step for step, metric in enumerate(best) if metric is None]
    assert begins == [0, 4, 12]  # of twenty steps


def test_trials_of_a_search_are_refused(tmp_path: Path) -> None:
    run, trial = runs.trainer(tmp_path, None), TrainerState(is_hyper_param_search=True)
    with pytest.raises(UnsupportedModelError, match="hyperparameter_search keeps checkpoints"):
        require_what_can_be_followed(run.args, trial, run.model, runs.config())


def test_a_batch_size_that_is_found_is_that_of_our_passes_too(tmp_path: Path) -> None:
    def full(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 2 * 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    config = runs.config(calibration_batch_size=None)
    run = runs.trainer(tmp_path, config, per_device_train_batch_size=8, auto_find_batch_size=True)
    run.model.register_forward_pre_hook(full, with_kwargs=True)
    assert run.train().global_step == runs.STEPS
    assert run.state.train_batch_size == 2


def test_a_run_resumed_with_smaller_batches_has_them_in_our_passes_too(tmp_path: Path) -> None:
    config = runs.config(calibration_batch_size=None, refit_first_tokens=0)
    runs.trainer(tmp_path, config, save_strategy="steps", save_steps=4, per_device_train_batch_size=8).train()
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run = runs.trainer(tmp_path, config, **smaller)
    rows = []
    run.model.register_forward_pre_hook(lambda _m, _args, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert max(rows) == 2


@pytest.mark.parametrize("use_reentrant", [True, None])
def test_a_model_that_was_asked_itself_for_reentrant_checkpointing_is_refused(use_reentrant, tmp_path: Path) -> None:
    """PyTorch's default, as which PEFT's `prepare_model_for_kbit_training` asks for it."""
    model = runs.peft_model()
    families.checkpoint(model, use_reentrant)
    with pytest.raises(UnsupportedModelError, match="use_reentrant=True hides gradients that pruning measures"):
        runs.trainer(tmp_path, runs.config(), model=model).train()


class Sized(IterableDataset):
    """Rows that come one after the other, of which it is known how many there are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def test_rows_that_come_one_by_one_may_have_a_number(tmp_path: Path) -> None:
    callback = ATPCallback(runs.config(), calibration_dataset=runs.dataset(16, seed=1), report=False)
    evaluation = Sized(runs.dataset(8, seed=2))
    run = runs.trainer(
        tmp_path, callback, train=Sized(runs.dataset()), evaluation=evaluation, eval_strategy="steps", eval_steps=5
    )
    assert run.train().global_step == runs.STEPS


def test_given_rows_may_have_columns_that_the_trainer_takes_from_the_training_set(tmp_path: Path) -> None:
    def with_text(rows: int, seed: int) -> Any:
        return runs.dataset(rows, seed=seed).add_column("text", ["fever " * (i + 1) for i in range(rows)])

    found = []
    for name, prepared in (("text", with_text), ("bare", lambda rows, seed: runs.dataset(rows, seed=seed))):
        callback = ATPCallback(
            runs.config(), calibration_dataset=prepared(16, 1), held_out_dataset=prepared(8, 2), report=False
        )
        run = runs.trainer(tmp_path / name, callback, train=prepared(120, 0))
        run.train()
        found.append((runs.losses(run), (tmp_path / name / "journal.jsonl").read_text().count("held_out")))
    assert found[0] == found[1]


def test_evaluation_sets_are_compared_once_and_rows_measured_once_a_step(tmp_path: Path, monkeypatch) -> None:
    hashed = []
    row_hash = calibration.row_hash
    monkeypatch.setattr(calibration, "row_hash", lambda row: hashed.append(1) or row_hash(row))
    sets = {name: runs.dataset(8, seed=seed).add_column("n", list(range(8))) for name, seed in (("a", 1), ("b", 2))}
    run = runs.trainer(tmp_path, runs.config(refit_rows=8), evaluation=sets, eval_strategy="steps", eval_steps=2)
    run.train()
    by_five = len(hashed)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    measured = [line["step"] for line in lines if "held_out" in line]
    assert measured.count(4) == 1
    assert {2, 4, 6, 8, 10} <= set(measured)
    again = {"evaluation": sets, "eval_strategy": "steps", "eval_steps": 5}
    runs.trainer(tmp_path / "again", runs.config(refit_rows=8), **again).train()
    assert len(hashed) == 2 * by_five, "as many for two evaluations as for five"


def test_an_evaluation_set_without_labels_is_evaluated(tmp_path: Path) -> None:
    evaluation = runs.dataset(8, seed=1).remove_columns("labels")
    run = runs.trainer(tmp_path, runs.config(), evaluation=evaluation, eval_strategy="steps", eval_steps=5)
    assert run.train().global_step == runs.STEPS


def test_another_runs_checkpoint_of_the_same_step_is_not_gone_on_with(tmp_path: Path) -> None:
    for name, rate in (("a", 5e-3), ("b", 1e-3)):
        runs.trainer(tmp_path / name, runs.config(), save_strategy="steps", save_steps=4, learning_rate=rate).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(CheckpointError, match="is of another run than the one that is resumed"):
        runs.trainer(tmp_path / "b", runs.config()).train(resume_from_checkpoint=checkpoint)
    mixed = ATPCallback(runs.config(), resume_from_checkpoint=tmp_path / "b" / "checkpoint-4", report=False)
    with pytest.raises(CheckpointError, match="is of another run than the one that is resumed"):
        runs.trainer(tmp_path / "c", mixed).train(resume_from_checkpoint=checkpoint)
    callback = ATPCallback(runs.config(), resume_from_checkpoint=checkpoint, report=False)
    assert runs.trainer(tmp_path / "b", callback).train(resume_from_checkpoint=checkpoint).global_step == runs.STEPS


def test_what_is_exported_caches_as_its_base_does_and_exports_again_with_the_runs_tokenizer(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    run = runs.trainer(tmp_path / "run", runs.config(), base=tmp_path / "base")
    run.processing_class = run.callback_handler.processing_class = tiny.tokenizer()
    run.processing_class.chat_template = "{{ messages }} of the run"
    assert run.model.config.use_cache is False, "the Trainer's"
    run.train()
    folders = [tmp_path / "run" / "pruned", tmp_path / "again"]
    assert main(["export", str(tmp_path / "run"), str(folders[1])]) == 0
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
        assert AutoTokenizer.from_pretrained(folder).chat_template == run.processing_class.chat_template


def test_a_resumed_run_asks_once_more_whether_copies_fit(tmp_path: Path, monkeypatch) -> None:
    """Before its first step nobody knows how much memory a step takes."""
    runs.trainer(tmp_path, runs.config(), save_strategy="steps", save_steps=7).train()
    asked: list[int] = []
    run = runs.trainer(tmp_path, runs.config())
    monkeypatch.setattr("atp.layers.attachment.copies_fit", lambda *_: asked.append(run.state.global_step) or True)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert asked == [7, 8]
