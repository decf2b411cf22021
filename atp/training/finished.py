"""A run resumed at its last step, as after a kill while its model was exported: the Trainer takes a step more."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class FinishedRun(TrainerCallback):
    """Makes a step after the last one that none: it changes no weight, and is not counted, logged, evaluated or saved.

    Attributes:
        is_over: whether the step at hand is such a one.
    """

    def __init__(self) -> None:
        self.is_over = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With a learning rate of zero the optimizer, its weight decay included, does nothing."""
        self.is_over = state.global_step >= state.max_steps
        for group in kwargs["optimizer"].param_groups if self.is_over else ():
            group["lr"] = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take it back."""
        if self.is_over:
            state.global_step = state.max_steps
            self.on_epoch_end(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave what the last step saved."""
        if self.is_over:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """At the end."""
        self.correct(kwargs["logs"])

    def correct(self, logs: dict[str, Any]) -> None:
        """Take the mean loss over no steps out of `logs`: the Trainer divides by 0.001 there."""
        if self.is_over:
            logs.pop("train_loss", None)
