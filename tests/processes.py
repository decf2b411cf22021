"""Tiny runs, in one process or several: `python -m tests.processes FOLDER CASE...`; every process leaves what it saw.

Under `accelerate launch` with a file of `configs/accelerate/` they run on that engine, on CPUs. `--killed step` kills
the second process in the middle of a step, `--killed save` the first in the middle of a save; `--resume` goes on.
"""

import argparse
import hashlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, training_args

from atp import ATPCallback
from atp.data import IGNORED
from atp.journal import JOURNAL, read_lines
from atp.layers import attachment_of
from atp.structure.sharding import is_sharded, whole
from atp.training import propagation
from tests import runs

ROWS_A_STEP = 4
"""Of all processes together."""

HELD_OUT = runs.dataset(6, seed=9)

TRAIN = runs.dataset().map(
    lambda row, index: {"labels": [IGNORED] * (index % 6) + row["labels"][index % 6 :]}, with_indices=True
)
"""Rows of which not all tokens are learned: batches of as many rows count differently."""

FOLLOW_BLOCK = propagation._follow_block

KILLED_AT = 6
"""The step in which, or the checkpoint at which, a process dies."""


@dataclass(frozen=True)
class Case:
    """One run: settings of `ATPConfig` and of `TrainingArguments`."""

    atp: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    rows_a_pass: int = ROWS_A_STEP


CASES = {
    "joint": Case({"start_at": 0.2}),
    "distilled": Case(runs.LATE),
    "alternating": Case({"mode": "alternating", "generator_every": 2, "init": "activation", "compensate": "weights"}),
    "accumulated": Case(
        {"space": "disp"}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 6}, 2
    ),
    "bf16": Case({"start_at": 0.2}, {"bf16": True}),
    "spaces": Case({"start_at": 0.2, "space": "width+hidden+depth"}),
    "stopped": Case(runs.OFF_BUDGET | {"on_alert": "stop"}),
}


class Seen(TrainerCallback):
    """A hash of the decision in force, pass by pass, and which batches the last refit looked at here."""

    def __init__(self) -> None:
        self.decisions: list[str] = []
        self.refitted_to: list[int] = []
        propagation._follow_block = self._follow_block

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._see(kwargs["model"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._see(kwargs["model"])

    def _follow_block(self, *args: Any) -> None:
        self.refitted_to = [stream.index for stream in args[-1]]
        FOLLOW_BLOCK(*args)

    def _see(self, model: Any) -> None:
        masks = attachment_of(model).decision().values()
        self.decisions.append(hashlib.sha256(torch.cat(list(masks)).numpy().tobytes()).hexdigest()[:16])


def be_killed() -> None:
    """Say so, and end without a word more: the launcher may name another process, which ends of it at once."""
    print("this process is killed now", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class KilledInStep(TrainerCallback):
    """Ends the second process between backward and the optimizer's step, or right after it (DeepSpeed)."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT and args.process_index == 1:
            be_killed()


class KilledInSave(Trainer):
    """Ends the first process when weights and optimizer are written, and the rest is not."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == KILLED_AT and self.args.process_index == 0:
            be_killed()
        super()._save_rng_state(output_dir)


def processes() -> int:
    """How many run this."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def engine_on_cpu() -> dict[str, Any]:
    """Training arguments for the engine that the launcher has named, on CPUs, where accelerate leaves FSDP out."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        training_args.is_torch_bf16_gpu_available = lambda: True  # `use_cpu` would leave DeepSpeed out
        return {"use_cpu": False, "ddp_backend": "gloo"}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return {"accelerator_config": {"use_configured_state": True}}
    return {}


def prepared(
    case: Case, folder: Path, base: Path | None, killed: str | None = None, **arguments: Any
) -> tuple[Trainer, Seen]:
    """A Trainer for a case, ready to train."""
    seen = Seen()
    settings = {"per_device_train_batch_size": case.rows_a_pass // processes(), "ddp_find_unused_parameters": False}
    settings |= case.arguments | arguments | engine_on_cpu()
    callbacks = (seen, KilledInStep()) if killed == "step" else (seen,)
    atp = dict(case.atp)
    if atp.get("mode") == "alternating":  # each process's own rows; the readers' refit draws tokens batch by batch
        atp["calibration_batch_size"] = case.rows_a_pass // processes()
    ours = ATPCallback(runs.config(**atp), held_out_dataset=HELD_OUT, report=False)
    run = runs.trainer(folder, ours, train=TRAIN, base=base, callbacks=callbacks, **settings)
    if killed == "save":
        run.__class__ = KilledInSave
    if (plugin := getattr(run.accelerator.state, "deepspeed_plugin", None)) is not None:
        # "auto" would be 1,024 elements for a model this small, and keep all of its parameters whole
        buckets = {"reduce_bucket_size": 10**6, "stage3_prefetch_bucket_size": 10**5}
        plugin.deepspeed_config["zero_optimization"] |= buckets | {"stage3_param_persistence_threshold": 0}
    return run, seen


def leave(run: Trainer, seen: Seen, out: Path) -> None:
    """What a process ends with: all weights, the generator's logits and the decision, and what it saw."""
    rank = int(os.environ.get("RANK", "0"))
    parameters = dict(run.accelerator.unwrap_model(run.model).named_parameters())
    tensors = {name: whole(parameter).clone() for name, parameter in parameters.items()}
    learner = runs.callback_of(run).learner
    save_file(learner.attachment.decision(), out / f"decision-{rank}.safetensors")
    save_file({name: z.detach().clone() for name, z in learner.generator().items()}, out / f"logits-{rank}.safetensors")
    save_file({n: t for n, t in tensors.items() if "lora_" in n}, out / f"adapter-{rank}.safetensors")
    save_file({n: t for n, t in tensors.items() if "base_layer" in n}, out / f"base-{rank}.safetensors")
    report = {
        "decisions": seen.decisions,
        "refitted to": seen.refitted_to,
        "losses": runs.losses(run),
        "held out": [found["held_out"] for found in read_lines(out / JOURNAL)[0] if "held_out" in found],
        "engine": type(run.model_wrapped).__name__,
        "compact": learner.attachment.is_compact,
        "in parts": [name for name, parameter in parameters.items() if is_sharded(parameter)],
    }
    (out / f"seen-{rank}.json").write_text(json.dumps(report))


def main(argv: Sequence[str] | None = None) -> None:
    """Run cases one after the other; words of the command line, where none are given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--killed", choices=("step", "save"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--base", type=Path, help="folder to load the model from, as the engine has it loaded")
    words = parser.parse_args(argv)
    saving = {"save_strategy": "steps", "save_steps": 2} if words.killed or words.resume else {}
    for name in words.cases:
        run, seen = prepared(CASES[name], words.folder / name, words.base, words.killed, **saving)
        run.train(resume_from_checkpoint=words.resume)
        leave(run, seen, words.folder / name)


if __name__ == "__main__":
    main()
