"""Tiny Trainer runs: a random Llama with LoRA on random tokens, a few steps, on the CPU."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from atp import ATPCallback, ATPConfig
from tests import tiny

STEPS = 10


def config(**changes: Any) -> ATPConfig:
    """A configuration that fits the tiny model, and learns, with noise, for six of ten steps."""
    settings = {
        "round_to": 1,
        "calibration_rows": 8,
        "calibration_batch_size": 4,
        "start_at": 0.0,
        "freeze_at": 0.6,
        "noise": 0.2,
        "init_trials": 2,
    }
    return ATPConfig(**(settings | changes))


LATE = {"start_at": 0.2, "freeze_at": 0.6, "distill": 0.5}
"""Pruning begins after two of ten steps, and the model as it was by then teaches."""

OFF_BUDGET = {"freeze_at": 1.0, "on_budget": False, "init": "ones", "budget_weight": 0.0}
"""Nothing makes decisions keep to the budget, which is an alert before they are final."""


def peft_model(dropout: float = 0.0, folder: Path | None = None, **lora: Any) -> PeftModel:
    """The tiny Llama with LoRA, the same at every call; loaded from a folder, where one is given."""
    base = tiny.model() if folder is None else LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": dropout} | lora
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def dataset(rows: int = 120, length: int = 12, seed: int = 0) -> Dataset:
    """Random tokens."""
    ids = torch.randint(2, 384, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(
    folder: Path,
    atp: ATPConfig | ATPCallback | None,
    *,
    model: PeftModel | None = None,
    train: Any = None,
    evaluation: Any = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    base: Path | None = None,
    **arguments: Any,
) -> Trainer:
    """An unmodified Trainer with our callback (or without, where `atp` is None).

    Args:
        base: folder of the model, where `model` is not given; it is loaded when the engine is known.
    """
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | arguments
    ours = () if atp is None else (atp if isinstance(atp, ATPCallback) else ATPCallback(atp, report=False),)
    args = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(
        model=model or peft_model(folder=base),
        args=args,
        train_dataset=dataset() if train is None else train,
        eval_dataset=evaluation,
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        callbacks=[*ours, *callbacks],
    )


def callback_of(run: Trainer) -> ATPCallback:
    """The run's callback."""
    return next(c for c in run.callback_handler.callbacks if isinstance(c, ATPCallback))


def losses(run: Trainer) -> list[float]:
    """As logged, in their order."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def adapter(run: Trainer) -> dict[str, Tensor]:
    """LoRA weights."""
    return {k: v.detach().clone() for k, v in run.model.state_dict().items() if "lora_" in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative error over tensors."""
    return max(((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)).item() for k in a)
