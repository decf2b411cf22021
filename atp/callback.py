"""`ATPCallback`: the one file that knows Trainer events, and the one place where learning and export meet.

    Trainer(model=peft_model, ..., callbacks=[ATPCallback(ATPConfig(sparsity=0.4))]).train()

leaves `output_dir/final/` (adapter, decision, generator) and `output_dir/pruned/` (the smaller model). Works in an
unmodified `Trainer`, an unmodified TRL `SFTTrainer`, and a `DPOTrainer` with `precompute_ref_log_probs=True`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from atp.config import ATPConfig
from atp.errors import CalibrationError, CheckpointError, ConfigError, DivergedError, UnsupportedModelError
from atp.export import About, Result, export, require_mergeable
from atp.export.card import chosen
from atp.files import write_json, written_by_one
from atp.layers import Attachment, attach, attachment_of, detach
from atp.processes import counted, summed
from atp.report import write_report
from atp.structure.budget import target_parameters
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm, is_adapters
from atp.structure.sample import base_sample
from atp.structure.sharding import held, is_sharded, settle, shape_of, whole
from atp.structure.space import Space
from atp.subset import evenly_spread
from atp.trackers import Feeder
from atp.training.calibration import indexable, shared_row, with_columns_of
from atp.training.compensation import load_compensated
from atp.training.finished import FinishedRun
from atp.training.learner import COMPENSATED, DecisionLearner
from atp.training.monitor import Monitor
from atp.training.run import PruningRun
from atp.training.state import (
    BASE,
    FOLDER,
    check_same_run,
    load_state,
    not_finished_yet,
    save_state,
    set_aside_unfinished,
    under,
)
from atp.training.supported import require_supported

logger = logging.getLogger(__name__)

ADAPTERS = "adapters"
"""In the state of a run's end: names of the adapters that it ended with."""

LOG_PREFIX = "atp/"
HELD_OUT_ROWS = 32
"""Rows at most on which the dense and the pruned model are watched."""


class ATPCallback(TrainerCallback):
    """Learns what to prune while the Trainer's LoRA run learns the domain, and exports the pruned model.

    Args:
        config: the settings; `ATPConfig()` where left out.
        calibration_dataset: rows prepared like the training set. Where left out, `config.calibration_rows` rows are
            held out of the training set, at most a tenth of it.
        resume_from_checkpoint: the checkpoint folder, needed only when a path outside `output_dir` is handed to
            `Trainer.train(resume_from_checkpoint=...)`.
        held_out_dataset: rows prepared like the training set, of which a few show how the dense and the pruned model do
            while the run goes on: at its beginning, at the freeze, at its end and whenever the Trainer evaluates. The
            Trainer's evaluation set, once it evaluates, where left out.
        report: write `metrics.json` and the page `report.html` into the output folder when training ends.
    """

    def __init__(
        self,
        config: ATPConfig | None = None,
        calibration_dataset: Any = None,
        resume_from_checkpoint: str | Path | None = None,
        held_out_dataset: Any = None,
        report: bool = True,
    ) -> None:
        if not isinstance(config, ATPConfig | None):
            raise ConfigError(f"ATPCallback takes an ATPConfig, not {type(config).__name__}: ATPConfig(**settings)")
        self.config = config or ATPConfig()
        self._held_out, self._report = held_out_dataset, report
        self._monitor: Monitor | None = None
        self._feeder = Feeder(self.add_metrics, self._kept_by_block)
        self._given_calibration = calibration_dataset
        self._resume_from = resume_from_checkpoint
        self._calibration_hashes: set[str] = set()
        self._run: PruningRun | None = None
        self._base: list[float] | None = None
        self._learning_rate = 0.0
        self._loss_scale = 1.0
        self._saved_step: int | None = None
        self._saves_after_evaluation = False
        self._checked: dict[Any, Any] = {}
        self._stopped = False
        self._finished = FinishedRun()
        self._evaluated_step: int | None = None

    @property
    def learner(self) -> DecisionLearner:
        """The learner of the run that is going on or that ended last."""
        return self._running().learner

    def summary(self) -> dict[str, Any]:
        """What the decision stands at: sparsity asked and achieved, parameters, kept share per group kind, its lean."""
        learner = self.learner
        space, decision = learner.space, learner.decision(final=True)
        kept = int(space.kept_parameters(space.kept_counts(decision)).item())
        return {
            "sparsity_asked": self.config.sparsity,
            "sparsity": space.sparsity(decision),
            "prunable_parameters": space.prunable_parameters,
            "kept_parameters": kept,
            "frozen_at_step": learner.frozen_at,
            "kept_share": space.kept_share(decision),
            "overlap_with_start": learner.overlap(),
            "lean": self._running().lean,
        }

    # -- Trainer events, in the order in which they fire ------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Reach trackers, which log before user callbacks do; leave no half-written checkpoint to be resumed from."""
        self._feeder.join()
        with args.main_process_first(local=False, desc="half-written checkpoints"):
            if state.is_world_process_zero:
                set_aside_unfinished(Path(args.output_dir), each_machine=args.save_on_each_node)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Discover, attach, and start (or resume) the learner. May run twice (`auto_find_batch_size`)."""
        self._feeder.join()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        require_supported(args, state, model, self.config)
        space = self._space(model)
        if self._run is not None and attachment_of(model) is self.learner.attachment:
            self._let_go(model)
        self._base = base_sample(model, space.structure)
        self._run, self._monitor, attachment = None, None, attach(model, space)
        try:
            self._start(args, state, model, loader, attachment)
        except BaseException:
            self._let_go(model)
            raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """This step's masks and teacher."""
        self._finished.on_step_begin(args, state, control, **kwargs)
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]  # DeepSpeed moves both on too early
        self._loss_scale = _loss_scale(kwargs)
        if self._finished.is_over:
            return
        freezes = not self.learner.frozen and state.global_step >= self.learner.schedule.freeze_step
        if freezes:
            self._watching().measure_held_out(state.global_step, dense=True, pruned=False)
        self._running().begin_step(state.global_step, self._loss_scale)
        if freezes:
            self._watching().measure_held_out(state.global_step, dense=False, pruned=True)
        if freezes or state.global_step == self.learner.schedule.start_step:
            # evaluations so far were of models that had more, or other groups, than the one that will be exported
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before a gradient that is not finite is applied; then the joint generator step.

        DeepSpeed has stepped by now, and keeps gradients to itself: there, the masks' tell.
        """
        if getattr(kwargs["optimizer"], "scaler", None) is None:
            self._require_finite(args, state, kwargs["model"])
        self.learner.update_from_step(self._loss_scale)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The proximal step on LoRA, with the learning rate that this optimizer step used."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.learner.proximal_step(self._learning_rate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluation sees the noise-free decision."""
        self._finished.on_step_end(args, state, control)
        if self._finished.is_over:
            return
        self._running().end_step()
        self._before_evaluation_and_saving(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`; what an alert has stopped is saved, whatever an evaluation has decided since."""
        control.should_save |= self._stopped and self._saved_step != state.global_step
        self._finished.on_epoch_end(args, state, control)
        self._before_evaluation_and_saving(args, state, control, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is to be saved after the evaluation, before the Trainer's own part; then the dense model beside it."""
        if self._saves_after_evaluation:
            self._save_first(args, state, kwargs["model"])
        if self._run is None:  # an evaluation before training
            return
        monitor, learner = self._watching(), self.learner
        if monitor.held_out is None:
            self._watch(getattr(kwargs.get("eval_dataloader"), "dataset", None))
        decided = learner.step >= learner.schedule.start_step
        if self._evaluated_step != state.global_step:  # by another of several sets
            monitor.measure_held_out(state.global_step, dense=not learner.frozen, pruned=decided)
        if monitor.held_out is not None:
            self._evaluated_step = state.global_step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once a set: refuse an evaluation set that shares a row with the calibration set that was given.

        Of rows held out of the training set it may have some: those that it shares with that set.
        """
        dataset = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        name = getattr(dataset, "_fingerprint", None) or id(dataset)  # the Trainer makes a new one for each evaluation
        if indexable(dataset) and name not in self._checked:
            self._require_apart(dataset)
            self._checked[name] = None if isinstance(name, str) else dataset  # an `id` is free again without it

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what happened into the Trainer's own log and the journal; act on alerts."""
        self.add_metrics(kwargs["logs"])
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            self.add_metrics(state.log_history[-1])
        if self._monitor is None:
            return
        alerts = self._monitor.log(state.global_step, kwargs["logs"])
        if self.config.on_alert == "stop" and counted(len(alerts)):
            control.should_training_stop = control.should_save = self._stopped = True
            logger.warning("atp: training stops at step %d, for on_alert='stop'; it is saved", state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the run's state into the checkpoint the Trainer has just written, unless it is there already.

        It is not where an evaluation has decided to save (`save_strategy="best"`).
        """
        self._save_checkpoint(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze if that has not happened, then write `final/` and `pruned/`."""
        learner, model = self.learner, kwargs["model"]
        self._running().end()
        best = args.load_best_model_at_end and state.best_model_checkpoint
        if best:
            learner.load_state(*self._load(Path(best), args, state))
        evaluation = self._evaluation(args, state)
        if not learner.frozen:
            logger.warning(
                "atp: training ended%s at step %d, before the decision was frozen (step %d): it is frozen now, and "
                "LoRA has not been trained under it",
                " with the weights of its best checkpoint" if best else "",
                state.best_global_step if best else state.global_step,
                learner.schedule.freeze_step,
            )
            learner.freeze()
        self._watching().end(state.global_step)
        processing_class = kwargs.get("processing_class")
        self._write_final(args, state, model, processing_class)
        if self.config.export:
            pruned, writes = Path(args.output_dir) / "pruned", state.is_world_process_zero
            about = self._about(model, evaluation)
            export(model, pruned, processing_class=processing_class, overwrite=True, writes=writes, about=about)
        if self._report and state.is_world_process_zero:
            self._write_report(Path(args.output_dir), model)

    # -- the steps behind them -----------------------------------------------------------------------------------

    def _let_go(self, model: nn.Module) -> None:
        """Leave the model as it was before a run, but for what LoRA has learned."""
        if self._run is not None:
            self._run.end()
            self._run.undo()
        detach(model)

    def add_metrics(self, logs: dict[str, Any]) -> None:
        """Add the last step's figures to `logs`, unless it is an evaluation's or the end's log."""
        self._finished.correct(logs)
        if self._monitor is not None and "loss" in logs:
            logs |= {f"{LOG_PREFIX}{name}": value for name, value in self._monitor.figures().items()}

    def _require_apart(self, evaluation: Any) -> None:
        if (row := shared_row(self._calibration_hashes, evaluation)) is None:
            return
        if self._given_calibration is not None:
            raise CalibrationError(
                f"evaluation row {row} is also a calibration row, so its score would be flattered: remove it from one "
                "of the two sets"
            )
        logger.warning("atp: evaluation row %d is a training row too: what such a set says is flattered", row)

    def _kept_by_block(self) -> Mapping[str, list[float]] | None:
        return None if self._monitor is None else self._monitor.kept_by_block()

    def _watch(self, rows: Any) -> None:
        """Take a few of these rows to watch the dense and the pruned model on."""
        if indexable(rows):
            chosen_rows = [rows[index] for index in evenly_spread(len(rows), HELD_OUT_ROWS)]
            held_out = self._running().held_out(chosen_rows)
            self._watching().held_out = held_out if held_out.is_labelled else None

    def _watching(self) -> Monitor:
        assert self._monitor is not None
        return self._monitor

    def _write_report(self, folder: Path, model: nn.Module) -> None:
        results = {
            "model": causal_lm(model).name_or_path,
            "pruning": self.summary(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        }
        write_json(folder / "metrics.json", results)
        write_report(folder)

    def _before_evaluation_and_saving(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        self._saves_after_evaluation = control.should_save and control.should_evaluate
        if control.should_evaluate:
            self.learner.show_decision()
        elif control.should_save:
            self._save_first(args, state, model)

    def _save_first(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Once the Trainer has saved, it may remove an older checkpoint, and this one must be complete."""
        if state.is_world_process_zero:
            not_finished_yet(_checkpoint(args, state))
        self._save_checkpoint(args, state, model)
        self._saves_after_evaluation = False

    def _save_checkpoint(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self._saved_step != state.global_step:
            settle(model)
            self._save(_checkpoint(args, state), args, state, self._running().state())
            self._saved_step = state.global_step

    def _running(self) -> PruningRun:
        if self._run is None:
            raise UnsupportedModelError("ATPCallback has not seen a training run yet: call trainer.train() first")
        return self._run

    def _space(self, model: nn.Module) -> Space:
        if isinstance(model, FullyShardedDataParallel):
            raise UnsupportedModelError("FSDP1 is not supported: set fsdp_version 2, as configs/accelerate/fsdp2.yaml")
        if not isinstance(model, PeftModel):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no LoRA: wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
            )
        config, lm = self.config, causal_lm(model)
        if lm.get_output_embeddings() is not None and (trained_whole := _trained_whole(lm)):
            raise UnsupportedModelError(
                f"{trained_whole} is trained whole (modules_to_save) and would lose parts: leave it to target_modules"
            )
        space = build_space(discover(model), config.space, config.uniform, config.round_to)
        target_parameters(space, config.sparsity)
        paths = [linear.path for linear in space.linears]
        if not any(isinstance(lm.get_submodule(path), LoraLayer) for path in paths):
            raise UnsupportedModelError(
                "LoRA is on none of the linear layers to be pruned: give LoraConfig target_modules such as "
                f"'all-linear' (they are {', '.join(sorted({path.rsplit('.', 1)[-1] for path in paths}))})"
            )
        if config.export:
            require_mergeable(lm)
        if (names := _active(model)) != ["default"]:
            logger.warning(
                "atp: the active adapters are %s, and atp loads runs of one that is called 'default': pruned/ will "
                "have what they have learned, but the run cannot be loaded again",
                ", ".join(names),
            )
        return space

    def _start(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: DataLoader, attachment: Attachment
    ) -> None:
        self._checked, self._saved_step, self._evaluated_step, self._stopped = {}, None, None, False
        self._run = run = PruningRun(
            self.config,
            model,
            attachment,
            loader,
            self._given_calibration,
            total_steps=state.max_steps,
            batch_size=_batch_size(loader, args),
            micro_batches=args.gradient_accumulation_steps,
            ranks=args.world_size if args.average_tokens_across_devices else 1,
            quiet=args.disable_tqdm or not state.is_world_process_zero,
        )
        self._calibration_hashes = run.calibration.hashes() if run.calibration else set()
        self._monitor = Monitor(run.learner, Path(args.output_dir), state.is_world_process_zero, LOG_PREFIX)
        self._watch(with_columns_of(self._held_out, loader.dataset))
        self._monitor.begin(state.global_step)
        if state.global_step == 0:
            self._monitor.measure_held_out(0, dense=True, pruned=False)
        if state.global_step > 0:
            run.load_state(*self._load(self._resumed_from(args, state), args, state))
        else:
            run.learner.start()
        if note := run.learner.note():
            logger.warning("atp: %s", note)

    @staticmethod
    def _require_finite(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        sharded = any(is_sharded(p) for p in model.parameters())
        gradients = [held(p.grad) for p in model.parameters() if p.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1, device=args.device)
        size = norms.float().sum()
        if (summed(size) if sharded else size).isfinite():
            return
        saved = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        last = f"the last good checkpoint is {saved}" if saved else "no checkpoint had been saved"
        raise DivergedError(
            f"a gradient is NaN or infinite at step {state.global_step}: nothing was applied and {last}; lower the "
            "learning rate or check the data, then resume"
        )

    def _identity(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            BASE: self._base,
            "config": self.config.to_dict(),
            "world_size": args.world_size,
            "total_steps": state.max_steps,
        }

    def _save(
        self,
        folder: Path,
        args: TrainingArguments,
        state: TrainerState,
        saved: tuple[dict[str, Tensor], dict[str, Any]],
    ) -> None:
        tensors, values = saved
        save_state(folder / FOLDER, tensors, values | self._identity(args, state), state.is_world_process_zero)

    def _load(
        self, folder: Path, args: TrainingArguments, state: TrainerState
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = load_state(folder / FOLDER)
        check_same_run(folder, values, self._identity(args, state))
        return tensors, values

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        given = self._resume_from or args.resume_from_checkpoint
        named = isinstance(given, str | Path) and bool(given)
        found = Path(given) if named else _checkpoint(args, state)
        if not named and not found.is_dir():
            raise CheckpointError(
                f"{found} is not there: where the run goes on from another folder, name that one in "
                "ATPCallback(resume_from_checkpoint=...) too"
            )
        _require_resumed(found, state)
        return found

    def _evaluation(self, args: TrainingArguments, state: TrainerState) -> Mapping[str, Any] | None:
        """The log of the last evaluation, or of the best checkpoint if that is kept, if it saw the final decision."""
        best = args.load_best_model_at_end and state.best_model_checkpoint
        kept = state.best_global_step if best else None
        losses = [entry for entry in state.log_history if "eval_loss" in entry and kept in (None, entry["step"])]
        frozen_at = self.learner.frozen_at
        return losses[-1] if losses and frozen_at is not None and losses[-1]["step"] > frozen_at else None

    def _about(self, model: nn.Module, evaluation: Mapping[str, Any] | None) -> About:
        """For the model card: the settings, and an evaluation's loss."""
        results: tuple[Result, ...] = ()
        if evaluation is not None:
            when = f"before the export, step {evaluation['step']}"
            results = (Result("evaluation set", "loss", evaluation["eval_loss"], when),)
        return About(causal_lm(model).name_or_path, settings={"atp": chosen(self.config)}, results=results)

    def _write_final(self, args: TrainingArguments, state: TrainerState, model: PeftModel, tokenizer: Any) -> None:
        final = Path(args.output_dir) / "final"
        with _beside_with_adapters(model, final, state.is_world_process_zero) as beside:
            tensors, values = self.learner.state()
            self._save(beside or final, args, state, (tensors, values | {ADAPTERS: _active(model)}))
            if beside is not None and tokenizer is not None:
                tokenizer.save_pretrained(beside)


def _active(model: PeftModel) -> list[str]:
    return sorted(model.active_adapters)


def save_adapters(model: PeftModel, folder: Path, writes: bool) -> None:
    """What `model.save_pretrained(folder)` writes, also where parameters are sharded over processes: all call it.

    Args:
        writes: True in one process.
    """
    with _beside_with_adapters(model, folder, writes):
        pass


@contextmanager
def _beside_with_adapters(model: PeftModel, folder: Path, writes: bool) -> Iterator[Path | None]:
    """`written_by_one`, where adapters lie in the folder already."""
    adapters = _gathered_adapters(model)
    with written_by_one(folder, writes) as beside:
        if beside is not None:
            model.save_pretrained(beside, state_dict=adapters)
        yield beside


def _gathered_adapters(model: PeftModel) -> dict[str, Tensor] | None:
    """Adapters and what else is trained, whole, where any is sharded; None where none is, and PEFT sees to them."""
    settle(model)
    saved = {name: p for name, p in model.named_parameters() if p.requires_grad or is_adapters(name)}
    if not any(is_sharded(p) for p in saved.values()):
        return None
    return {name: whole(p).cpu() for name, p in saved.items()}


def restore(model: nn.Module, final: str | Path) -> Attachment:
    """Put the decision saved in a run's `final/` on a freshly loaded `PeftModel` of the same adapter.

    Raises:
        CheckpointError: where the state is missing, damaged, or of another model.
    """
    tensors, values = load_state(Path(final) / FOLDER)
    config = ATPConfig.from_dict(values["config"])
    space = build_space(discover(model), config.space, config.uniform, config.round_to)
    masks = under(tensors, "decision.")
    if {s.name: (s.size,) for s in space.sets} != {k: tuple(v.shape) for k, v in masks.items()}:
        raise CheckpointError(f"{final}: holds a decision for another model: give the base model it was trained on")
    attachment = attach(model, space)
    attachment.set_masks(masks)
    load_compensated(attachment, under(tensors, COMPENSATED))
    return attachment


def _trained_whole(lm: Any) -> str | None:
    """Path of something with matrices, other than embedding and head, that an adapter holds a copy of."""
    spared = {id(lm.get_input_embeddings()), id(lm.get_output_embeddings())}
    for path, module in lm.named_modules():
        copied = isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in spared
        if copied and any(len(shape_of(parameter)) > 1 for parameter in module.parameters()):
            return path
    return None


def _batch_size(loader: DataLoader, args: TrainingArguments) -> int:
    """Rows of a training pass: `auto_find_batch_size` may have found fewer than `args` say, a state may be resumed."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or args.per_device_train_batch_size


def _loss_scale(kwargs: Mapping[str, Any]) -> float:
    """What a gradient scaler (fp16) multiplies the loss by, accelerate's or DeepSpeed's own."""
    optimizer = kwargs["optimizer"]
    scaler = getattr(optimizer, "scaler", None)
    own = getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0)
    return float(own) if scaler is None else scaler.get_scale()


def _require_resumed(folder: Path, state: TrainerState) -> None:
    """The Trainer does not tell callbacks where it resumes from; another run may have a checkpoint of the same step."""
    try:
        log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError):
        return  # which is told apart where it is read
    if json.dumps(log) != json.dumps(state.log_history):
        raise CheckpointError(
            f"{folder} is of another run than the one that is resumed: give "
            "ATPCallback(config, resume_from_checkpoint=...) the checkpoint that trainer.train() has"
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
