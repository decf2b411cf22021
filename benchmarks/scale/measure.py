"""Steps of a run on an engine, measured: memory of a process, seconds of a step, and what the callback takes of it.

    export ATP_ENGINE=fsdp2
    accelerate launch --config_file configs/accelerate/fsdp2.yaml benchmarks/scale/measure.py --out FILE

appends one row to FILE, of the first process, beside what `atp plan` says of the same run. Random weights of a model's
shapes, random text, and a decision that is random at first: what is timed does not depend on them. On CPUs `--cpu`
takes the engine that the launcher names all the same.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from atp import ATPCallback, ATPConfig
from atp.bench import plan, seconds_here
from atp.commands.models import load_shell, random_model
from atp.evaluation import peak_memory_mib, reset_peak_memory

_LORA_RANK = 16

_UNMEASURED = 2
"""First steps, in which libraries and optimizers allocate what they keep."""


class Timed(ATPCallback):
    """What the callback's own work takes, and the memory of steps after the first ones."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.own: list[float] = []
        self.steps: list[float] = []
        self._since = self._spent = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == _UNMEASURED:
            reset_peak_memory()
        self._since, self._spent = time.perf_counter(), 0.0
        self._timed(super().on_step_begin, args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timed(super().on_pre_optimizer_step, args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timed(super().on_optimizer_step, args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._timed(super().on_step_end, args, state, control, **kwargs)
        self.steps.append(time.perf_counter() - self._since)
        self.own.append(self._spent)

    def _timed(self, event: Any, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        event(*args, **kwargs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._spent += time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    step = (words.rows, words.length, _LORA_RANK, words.gradient_checkpointing)
    model = shell(words)
    engine = os.environ["ATP_ENGINE"]
    planned = plan(model, ATPConfig(), engine, int(os.environ["WORLD_SIZE"]), *step)
    here = partial(random_model, words.model, dtype=words.dtype)
    timed = partial(seconds_here, here, model.config.num_hidden_layers, ATPConfig(), engine, *step)
    seconds = [timed()]
    arguments: dict[str, Any] = {"bf16": words.dtype == "bfloat16"}
    if words.cpu:
        from tests.processes import engine_on_cpu  # noqa: PLC0415

        arguments = {"use_cpu": True} | engine_on_cpu()
    arguments["gradient_checkpointing"] = words.gradient_checkpointing
    training = silent(words.steps, words.rows, **arguments)
    torch.manual_seed(0)
    speed = [gb_per_s(training.world_size)]
    gc.collect()  # what was timed has gone
    before = resident_mib()
    base = here(words.layers)
    text = torch.randint(base.config.vocab_size, (1024, words.length)).tolist()
    settings = {"init": "random", "compensate": "none", "start_at": 0.0, "freeze_at": 1.0, "export": False}
    callback = Timed(ATPConfig(**settings))
    trainer = Trainer(
        get_peft_model(base, lora()),
        training,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in text],
        data_collator=default_data_collator,
        callbacks=[callback],
    )
    peak: list[float] = []
    trainer.add_callback(AtTheEnd(peak))
    trainer.train()
    unset_hf_deepspeed_config()  # or ZeRO-3 would cut up what is timed
    speed.append(gb_per_s(training.world_size))
    seconds.append(timed())  # again, for a machine may change its pace
    sent = sum(planned.messages.values()) / 1e9
    steps, own = callback.steps[_UNMEASURED:], callback.own[_UNMEASURED:]
    row = {
        "engine": engine,
        "model": words.model,
        "layers": words.layers,
        "processes": training.world_size,
        "rows": words.rows,
        "length": words.length,
        "dtype": words.dtype,
        "gradient_checkpointing": words.gradient_checkpointing,
        "mib": peak[0] - before,
        "seconds": statistics.median(steps),
        "plan_mib": planned.total / 2**20,
        "plan_seconds": statistics.mean(s + sent / gb for s, gb in zip(seconds, speed, strict=True)),
        "gb_per_s": statistics.mean(speed),
        "callback": statistics.median(o / s for o, s in zip(own, steps, strict=True)),
    }
    if training.process_index == 0:
        append(row | machine(), words.out)


def append(row: dict[str, Any], out: Path) -> None:
    print(json.dumps(row, indent=1))
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


def silent(steps: int, rows: int, **arguments: Any) -> TrainingArguments:
    """Training that saves and says nothing."""
    return TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=rows,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        **arguments,
    )


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=_LORA_RANK, lora_alpha=32, target_modules="all-linear")


def machine() -> dict[str, Any]:
    """What was measured on, for the row."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def shell(words: argparse.Namespace) -> PreTrainedModel:
    """The model without weights."""
    model = load_shell(words.model, dtype=words.dtype)
    if words.layers is None:
        return model
    model.config.num_hidden_layers = words.layers
    with torch.device("meta"):
        return type(model)(model.config).to(getattr(torch, words.dtype))


def gb_per_s(processes: int) -> float:
    """Between processes: what each sends while all gather a tensor the size of a block, and put it together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.zeros(4 << 20, device=device)
    parts = [torch.empty_like(own) for _ in range(processes)]
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.distributed.all_gather(parts, own)
        torch.cat(parts)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return (processes - 1) * own.nbytes / statistics.median(seconds) / 1e9


class AtTheEnd(TrainerCallback):
    """Reads the highest memory before anything is written."""

    def __init__(self, peak: list[float]) -> None:
        self._peak = peak

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == args.max_steps:
            self._peak.append(peak_memory_mib() or 0.0)


def resident_mib() -> float:
    """Of this process now; 0 on a GPU, where only what torch allocates counts."""
    if torch.cuda.is_available():
        return 0.0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
