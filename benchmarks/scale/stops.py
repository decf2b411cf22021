"""The two stops of a run, timed in one process or several: scores at the start, and the final refit.

    python benchmarks/scale/stops.py --cpu --out FILE
    accelerate launch --config_file configs/accelerate/ddp.yaml benchmarks/scale/stops.py --cpu --out FILE

append one row each to FILE, of the first process. Random weights of a model's shapes and random text: what is timed
does not depend on them. Rows of text are as many however many processes share them.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import append, lora, machine, silent
from peft import get_peft_model
from transformers import Trainer, default_data_collator

from atp import ATPCallback, ATPConfig
from atp.bench.timing import measured
from atp.commands.models import random_model

_ROWS = 2


class Timed(ATPCallback):
    """What each stop takes: scores before the first step, the refit before the second."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stops: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_train_begin, *args, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        event = super().on_step_begin
        if state.global_step == 1:
            self._timed(event, args, state, control, **kwargs)
        else:
            event(args, state, control, **kwargs)

    def _timed(self, event: Any, *args: Any, **kwargs: Any) -> None:
        self.stops.append(measured(partial(event, *args, **kwargs))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--score-rows", type=int, default=32)
    parser.add_argument("--refit-rows", type=int, default=64)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    training = silent(2, _ROWS, use_cpu=words.cpu)
    torch.manual_seed(0)
    base = random_model(words.model, words.layers, dtype="float32")
    text = torch.randint(base.config.vocab_size, (10 * words.score_rows, words.length)).tolist()
    rows = {"calibration_rows": words.score_rows, "refit_rows": words.refit_rows, "refit_first_tokens": 0}
    callback = Timed(ATPConfig(start_at=0.0, freeze_at=0.5, calibration_batch_size=_ROWS, export=False, **rows))
    Trainer(
        get_peft_model(base, lora()),
        training,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in text],
        data_collator=default_data_collator,
        callbacks=[callback],
    ).train()
    row = {
        "model": words.model,
        "layers": words.layers,
        "length": words.length,
        "score_rows": words.score_rows,
        "refit_rows": words.refit_rows,
        "processes": training.world_size,
        "scores": callback.stops[0],
        "refit": callback.stops[1],
    }
    if training.process_index == 0:
        append(row | machine(), words.out)


if __name__ == "__main__":
    main()
