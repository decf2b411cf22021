"""`atp bench train-step | run | infer | kernels | export`: speed before and after pruning, as ratios of one run."""

import argparse
import csv
import dataclasses
import io
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from atp.bench import (
    Case,
    Result,
    ceilings,
    export_cases,
    infer_cases,
    interleaved,
    kernel_cases,
    pruned_copy,
    train_step_cases,
    whole_run_results,
)
from atp.commands.models import random_model
from atp.commands.output import print_table
from atp.commands.shapes import SHAPES
from atp.config import IMPLS, SPACES, ATPConfig
from atp.errors import ConfigError
from atp.files import write_json, write_text
from atp.recipe import DTYPES

_WIDTH = 100

_NOT_SETTINGS = ("bench", "run", "results", "calls", "csv", "json", "overrides")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    train_step = _declare(benches, "train-step", "LoRA's optimizer step: dense, under masks, under the final decision")
    train_step.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    train_step.set_defaults(results=_train_step)
    whole = _declare(benches, "run", "a run with default settings beside plain LoRA, from a few steps of each kind")
    whole.add_argument("--steps", type=int, default=1000, help="of the run (default 1000)")
    whole.add_argument("--freeze-at", type=float, default=ATPConfig.freeze_at, help="share of the steps")
    whole.set_defaults(results=_whole_run)
    for bench in (train_step, whole):
        bench.add_argument("--rows", type=int, default=8, help="rows of the batch (default 8)")
        bench.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
        bench.add_argument("--impl", choices=IMPLS, default=ATPConfig.impl, help="how layers compute, see ATPConfig")
    export = _declare(benches, "export", "writing the smaller model of a run, beside a plain save of the dense one")
    export.set_defaults(results=_export)
    for bench in (train_step, whole, export):
        bench.add_argument("--lora-rank", type=int, default=16, help="default 16")
    infer = _declare(benches, "infer", "an exported model beside the dense one: reading a prompt, writing tokens")
    infer.add_argument("--tokens", type=int, default=512, help="of the prompt (default 512)")
    infer.add_argument("--written", type=int, default=16, help="tokens written a call (default 16)")
    infer.add_argument("--compile", action="store_true", help="decode with compiled models (on a GPU: as CUDA graphs)")
    infer.set_defaults(results=_infer)
    kernels = _declare(benches, "kernels", "one layer and its operations: PyTorch's, and kernels where a GPU is")
    kernels.add_argument("--tokens", type=int, default=4096, help="that a layer reads (default 4096)")
    kernels.set_defaults(results=_kernels, layers=1)


def _declare(benches: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(name, help=what)
    parser.add_argument(
        "--config", default="smollm2-135m", metavar="SHAPES", help=f"{', '.join(SHAPES)}, or a hub name or folder"
    )
    parser.add_argument("--layers", type=int, help="take this many blocks instead of all")
    parser.add_argument("--space", default="width", help=f"one of {', '.join(SPACES)}, or e.g. width+depth")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of prunable parameters (default 0.5)")
    parser.add_argument("--round-to", type=int, help="kept widths are multiples of this")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "auto"], default="float32")
    parser.add_argument("--calls", type=int, default=10, help="timed calls of each case (default 10)")
    parser.add_argument("--csv", metavar="FILE", help="write the rows here, with hardware and versions")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run, bench=name)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Time the cases of one benchmark and print a table."""
    for name in ("layers", "calls", "rows", "length", "lora_rank", "tokens", "written", "steps"):
        if (value := getattr(arguments, name, None)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be an integer >= 1")
    config = ATPConfig(
        space=arguments.space,
        sparsity=arguments.sparsity,
        round_to=arguments.round_to,
        freeze_at=getattr(arguments, "freeze_at", ATPConfig.freeze_at),
        impl=getattr(arguments, "impl", ATPConfig.impl),
    )
    torch.manual_seed(0)
    model = random_model(arguments.config, arguments.layers, arguments.dtype)
    machine = _machine(model.device) | ceilings(model.device, model.dtype)
    found: dict[str, list[Result]] = arguments.results(model, config, arguments)
    rows = [{"bench": name, **dataclasses.asdict(result)} for name, results in found.items() for result in results]
    setting = {key: value for key, value in vars(arguments).items() if key not in _NOT_SETTINGS}
    _print(arguments, machine, rows)
    if arguments.csv:
        write_text(arguments.csv, _csv([setting | row | machine for row in rows]))
    if arguments.json:
        write_json(arguments.json, {"setting": setting, "machine": machine, "rows": rows})


def _train_step(model: Any, config: ATPConfig, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    batch = (arguments.rows, arguments.length)
    cases = train_step_cases(model, config, arguments.lora_rank, *batch, arguments.gradient_checkpointing)
    return _interleaved({"train-step": cases}, arguments.calls)


def _whole_run(model: Any, config: ATPConfig, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    batch, steps = (arguments.rows, arguments.length), arguments.steps
    return {"run": whole_run_results(model, config, arguments.lora_rank, *batch, steps, arguments.calls)}


def _export(model: Any, config: ATPConfig, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    return _interleaved({"export": export_cases(model, config, arguments.lora_rank)}, arguments.calls)


def _infer(model: Any, config: ATPConfig, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    pruned = pruned_copy(model, config)
    cases = infer_cases(model.eval(), pruned, arguments.tokens, arguments.written, arguments.compile)
    return _interleaved(cases, arguments.calls)


def _kernels(model: Any, config: ATPConfig, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    return _interleaved(kernel_cases(model, config, arguments.tokens), arguments.calls)


def _interleaved(cases: dict[str, list[Case]], calls: int) -> dict[str, list[Result]]:
    return {name: interleaved(of_bench, calls) for name, of_bench in cases.items()}


def _print(arguments: argparse.Namespace, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    threads = machine["threads"]
    title = (
        f"{arguments.bench}: {arguments.config}, {arguments.space} {arguments.sparsity:.0%}, {arguments.dtype} "
        f"on {machine['processor']}, {threads} {'thread' if threads == 1 else 'threads'}: "
        f"matmul {machine['matmul_tflops']:.3g} TFLOP/s, copy {machine['copy_gb_per_s']:.3g} GB/s"
    )
    several = len({row["bench"] for row in rows}) > 1
    print_table(
        title,
        ("", "median ms", "p20", "p80", "ratio", "limit", "peak MiB"),
        [
            (
                f"{row['bench']}, {row['case']}" if several else row["case"],
                row["median_ms"],
                row["p20_ms"],
                row["p80_ms"],
                row["ratio"],
                _or_empty(row["limit"]),
                _or_empty(row["peak_mib"]),
            )
            for row in rows
        ],
        _WIDTH,
    )


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value


def _machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    gpu = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
