"""One tune-and-prune run, put together: calibration rows, the learner of decisions, compensation, and the teacher.

It knows no Trainer: `ATPCallback` calls it at the Trainer's events.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from atp.config import ATPConfig
from atp.data import learned_tokens
from atp.layers import Attachment
from atp.processes import counted, place
from atp.randomness import drawn_aside
from atp.training import trials
from atp.training.compensation import Compensation
from atp.training.distillation import Distillation
from atp.training.held_out import HeldOut
from atp.training.learner import DecisionLearner
from atp.training.schedule import Schedule
from atp.training.start import calibrate, for_refit, for_trials, start
from atp.training.state import under
from atp.training.trials import Trials

TEACHER = "teacher."
"""Prefix of the teacher's adapters in a checkpoint."""


class PruningRun:
    """What a run works with, from its first step on or from a checkpoint.

    Args:
        model: what the Trainer calls (a `PeftModel`), attached.
        loader: the Trainer's training batches; where `given` is None, calibration rows are held out of them.
        given: calibration rows prepared like the training set.
        total_steps: optimizer steps.
        batch_size: rows of a training forward pass.
        micro_batches: forward passes whose gradients one optimizer step adds up.
        ranks: processes over which the task loss counts its tokens (1 where each counts its own).
        quiet: no progress bars.

    Attributes:
        calibration: the rows, or None where the settings need none.
        learner: of the decision.
    """

    def __init__(
        self,
        config: ATPConfig,
        model: nn.Module,
        attachment: Attachment,
        loader: DataLoader,
        given: Any,
        *,
        total_steps: int,
        batch_size: int,
        micro_batches: int = 1,
        ranks: int = 1,
        quiet: bool = False,
    ) -> None:
        self._config, self._model = config, model
        self._collate, self._batch_size = loader.collate_fn, batch_size
        rows_a_pass = config.calibration_batch_size or min(batch_size, config.calibration_rows)
        self.calibration = calibrate(config, given, loader, rows_a_pass)
        schedule = Schedule.of(config, total_steps)
        distils = config.distils and schedule.start_step > 0
        self._compensation = compensation = Compensation(
            config.compensate,
            attachment,
            self._loss,
            self.calibration or (),
            at_hand=distils,
            compact=config.impl != "eager",
            reader_rounds=config.reader_rounds,
            quiet=quiet,
        )
        if compensation.refits and self.calibration is not None:
            rows = for_refit(self.calibration, config.refit_rows, loader, config.seed)
            compensation.final_batches = [*rows, *rows.first_tokens(config.refit_first_tokens)]
        grams = compensation.grams if compensation.refits else None
        self._judges: list[Any] = []
        if compensation.refits and self.calibration is not None and config.init_trials:
            self._judges = for_trials(self.calibration, trials.ROWS, loader, config.seed)
        self._trials = Trials(self._on_trial, config.init_trials if self._judges else 0, quiet)
        draw = partial(start, config, attachment, self.calibration, self._loss, quiet, grams, self._trials)
        self.learner = DecisionLearner(config, attachment, schedule, draw, compensation)
        self._distillation = (
            Distillation(model, attachment, compensation, config.distill, micro_batches, ranks) if distils else None
        )

    def held_out(self, rows: Sequence[Any], batch_size: int | None = None) -> HeldOut:
        """What watches the dense and the pruned model on these rows; `batch_size`: as in training where it is None."""
        paused = self._distillation.paused if self._distillation is not None else nullcontext
        return HeldOut(
            self._model,
            self.learner.attachment,
            self._compensation,
            rows,
            self._collate,
            batch_size or self._batch_size,
            paused,
        )

    def begin_step(self, step: int, loss_scale: float) -> None:
        """The alternating generator step where it is due, then this optimizer step's hard masks, then its teacher.

        Args:
            loss_scale: what a gradient scaler (fp16) multiplies the loss by.
        """
        learner, every = self.learner, self._config.generator_every
        if self._config.alternates and step % every == 0 and not learner.frozen and learner.schedule.learns(step):
            learner.alternate(step, lambda: self._generator_loss(step // every))
        learner.begin_step(step)
        if self._distillation is not None:
            self._distillation.begin_step(begins=step >= learner.schedule.start_step, loss_scale=loss_scale)

    def end_step(self) -> None:
        """Note what the step's passes have shown."""
        self.learner.metrics |= self._trials.metrics()
        if self._distillation is not None:
            self.learner.metrics |= self._distillation.metrics()

    @property
    def lean(self) -> dict[str, float] | None:
        """What trials have made of `init_tilt`, `init_attention` and `init_floor`; None where there were none."""
        return self._trials.state()

    def end(self) -> None:
        """Leave nothing on the model but the attachment."""
        if self._distillation is not None:
            self._distillation.remove()

    def undo(self) -> None:
        """Give the base model back the weights that compensation has changed: another run is to begin."""
        self._compensation.undo()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a bit-exact resume needs."""
        tensors, values = self.learner.state()
        teacher = self._distillation.state() if self._distillation is not None else {}
        tensors |= {f"{TEACHER}{k}": v for k, v in teacher.items()}
        return tensors, values | {"trials": self._trials.state()}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.learner.load_state(tensors, values)
        self._trials.load_state(values.get("trials"))  # checkpoints of before trials have none
        if self._distillation is not None:
            self._distillation.load_state(under(tensors, TEACHER))

    def _on_trial(self, decision: Mapping[str, Tensor]) -> Tensor:
        """What a decision would cost were it final (`Trials`)."""
        rows = self._judges
        with self._compensation.on_trial(decision):
            return self.held_out(rows, min(self._batch_size, -(-len(rows) // trials.BATCHES))).by_batch()

    def _generator_loss(self, turn: int) -> Tensor:
        """The loss on this process's batch of generator step number `turn`, by its labels' share of all processes'.

        So its mean over processes is the mean over all labels, and so are gradients.
        """
        assert self.calibration is not None
        rank, processes = place()
        batch = self.calibration.batch(turn * processes + rank)
        learned = learned_tokens(batch)
        share = learned * processes / max(counted(learned), 1)
        loss = self._loss(batch)
        return loss * share if learned else loss.nan_to_num() * 0.0  # a mean over no labels is not a number

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The model's own loss on a calibration batch; the global random state is left as it was."""
        inputs = send_to_device(dict(batch), next(self._model.parameters()).device)
        paused = self._distillation.paused() if self._distillation else nullcontext()
        with drawn_aside(self._model), paused:
            return self._model(**inputs).loss
