"""What watching a run costs: the time that `Monitor` takes at a log, as a share of the steps between two logs.

    python benchmarks/performance/monitoring.py [--steps 12] [--every 10]

SmolLM2-135M's shapes with random weights and tokens, 2,048 tokens a step, everything logged at every step; the share is
given for a log every `--every` steps. Held-out rows are not part of it: they are forward passes, and few (see
`configs/README.md`).
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DefaultDataCollator, Trainer, TrainerCallback, TrainingArguments

from atp import ATPCallback, ATPConfig
from atp.commands.models import random_model
from atp.training.monitor import Monitor

ROWS, LENGTH = 8, 256


class Steps(TrainerCallback):
    """Times steps from begin to end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_args, **_kwargs) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def timed(method: Callable, seconds: list[float]) -> Callable:
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=10)
    words = parser.parse_args()

    figures: list[float] = []
    logs: list[float] = []
    Monitor.figures = timed(Monitor.figures, figures)  # type: ignore[method-assign]
    Monitor.log = timed(Monitor.log, logs)  # type: ignore[method-assign]
    torch.manual_seed(0)
    model = get_peft_model(random_model("smollm2-135m"), LoraConfig(r=16, target_modules="all-linear"))
    ids = torch.randint(49152, (ROWS * (words.steps + 8), LENGTH)).tolist()
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        settings = ATPConfig(init="magnitude", compensate="none", start_at=0.0, freeze_at=1.0, export=False)
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=words.steps,
                per_device_train_batch_size=ROWS,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            data_collator=DefaultDataCollator(),
            callbacks=[ATPCallback(settings, report=False), steps],
        ).train()
    step = statistics.median(steps.seconds[1:])
    a_log = (sum(figures) + sum(logs)) / words.steps
    share = a_log / (step * words.every) * 100
    print(f"a step {step:.2f} s; a log {a_log * 1e3:.1f} ms: {share:.3f} % of {words.every} steps")


if __name__ == "__main__":
    main()
