"""What `atp train` measures besides the model that comes out: the memory that training took."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atp.evaluation import peak_memory_mib, reset_peak_memory


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
