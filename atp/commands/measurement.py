"""What `atp train` measures: the cost of training, and the model that came out of it."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from atp.evaluation import (
    count_parameters,
    flops_per_token,
    generation_speed,
    peak_memory_mib,
    prefill_speed,
    reset_peak_memory,
)
from atp.training.journal import Journal

_PROMPT_TOKENS = 256
_DECODE_PROMPT_TOKENS = 32
_DECODE_TOKENS = 16
_CALLS = 3


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


class JournalCallback(TrainerCallback):
    """Writes the journal of a run without pruning: what the Trainer logs."""

    def __init__(self) -> None:
        self._journal: Journal | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin it, or go on with it."""
        self._journal = Journal(Path(args.output_dir), state.is_world_process_zero)
        self._journal.begin(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A line."""
        if self._journal is not None:
            self._journal.write(state.global_step, "log", kwargs["logs"])


def model_cost(model: PreTrainedModel) -> dict[str, Any]:
    """Parameters, FLOPs per token, and the latency of one stream: a prompt read, and a token written."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROMPT_TOKENS
    prompt_tokens = min(_PROMPT_TOKENS, longest)
    prefill = prefill_speed(model, prompt_tokens=prompt_tokens, calls=_CALLS)
    decode = generation_speed(model, prompt_tokens=_DECODE_PROMPT_TOKENS, generated_tokens=_DECODE_TOKENS, calls=_CALLS)
    return {
        "parameters": count_parameters(model),
        "flops_per_token": flops_per_token(model),
        "prefill": dataclasses.asdict(prefill) | {"prompt_tokens": prompt_tokens},
        "decode": dataclasses.asdict(decode)
        | {
            "prompt_tokens": _DECODE_PROMPT_TOKENS,
            "generated_tokens": _DECODE_TOKENS,
            "latency_ms_per_token": decode.latency_ms / _DECODE_TOKENS,
        },
    }
