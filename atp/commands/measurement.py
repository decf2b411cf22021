"""What `atp train` has a run do besides: measure the memory that training takes, and keep its own intervals."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atp.evaluation import peak_memory_mib, reset_peak_memory
from atp.training.finished import FinishedRun
from atp.training.journal import Journal


class PeakMemoryCallback(TrainerCallback):
    """Takes the peak memory from the first to the last step.

    Stands before `ATPCallback`, so that its calibration passes count and the export, which the Trainer runs as part of
    the end of training, does not.
    """

    def __init__(self) -> None:
        self.peak_mib: float | None = None
        self._measurable = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from what is in memory now."""
        self._measurable = reset_peak_memory()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the peak."""
        self.peak_mib = peak_memory_mib() if self._measurable else None


class OwnIntervalsCallback(TrainerCallback):
    """Logs, evaluates and saves as often as the recipe says, where a run goes on that did so at other intervals.

    The Trainer takes them from the checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Those of the arguments."""
        state.compute_steps(args, state.max_steps)


class JournalCallback(FinishedRun):
    """Writes the journal of a run without pruning: what the Trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self._journal: Journal | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin it, or go on with it."""
        self._journal = Journal(Path(args.output_dir), state.is_world_process_zero)
        self._journal.begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A line."""
        super().on_log(args, state, control, **kwargs)
        if self._journal is not None:
            self._journal.write(state.global_step, "log", kwargs["logs"])
