"""`atp plan --model NAME --gpus N --engine ENGINE`: memory of each device and time of a step, from shapes alone."""

import argparse
import dataclasses
from functools import partial

from atp.bench import ENGINES, plan, seconds_here
from atp.commands.models import load_shell, random_model
from atp.commands.output import print_table
from atp.commands.shapes import SHAPES
from atp.config import SPACES, ATPConfig
from atp.errors import ConfigError
from atp.files import write_json
from atp.recipe import DTYPES

_NOT_ASKED = ("json", "run", "overrides")
_POSITIVE = ("gpus", "rows", "length", "lora_rank", "refit_rows", "tflops", "gb_per_s", "gpu_gib")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", required=True, metavar="NAME", help=f"{', '.join(SHAPES)}, a hub name or a folder")
    parser.add_argument(
        "--gpus", type=int, default=1, help="over which data and, by the engine, weights are shared out"
    )
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="see configs/accelerate/; no plan for hsdp")
    parser.add_argument("--rows", type=int, default=1, help="rows of a forward pass on one GPU (default 1)")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row (default 2048)")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "auto"], default="bfloat16")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="base weights quantised to so many")
    parser.add_argument("--lora-rank", type=int, default=16, help="on every linear layer (default 16)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--space", default="width", help=f"one of {', '.join(SPACES)}, or e.g. width+depth")
    parser.add_argument("--refit-rows", type=int, default=ATPConfig.refit_rows, help="see ATPConfig")
    parser.add_argument("--gpu-gib", type=float, help="memory of one GPU: says whether the plan fits")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--tflops", type=float, help="TFLOP/s that one GPU reaches in training, for the step's time")
    speed.add_argument("--here", action="store_true", help="time one and three blocks on this machine instead")
    parser.add_argument("--gb-per-s", type=float, help="GB/s between GPUs, for messages that nothing hides")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print two tables: what a GPU holds, and what a step takes."""
    for name in _POSITIVE:
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0")
    if arguments.gb_per_s and not (arguments.tflops or arguments.here):
        raise ConfigError("--gb-per-s counts beside --tflops or --here only: give one of them too")
    if arguments.bits and arguments.engine in ("fsdp2", "zero3"):
        raise ConfigError("--bits: FSDP2 does not share quantised weights out and ZeRO-3 takes none: plan ddp or zero2")
    config = ATPConfig(space=arguments.space, refit_rows=arguments.refit_rows)
    step = (arguments.rows, arguments.length, arguments.lora_rank, arguments.gradient_checkpointing)
    model = load_shell(arguments.model, dtype=arguments.dtype)
    found = plan(model, config, arguments.engine, arguments.gpus, *step, arguments.bits)
    seconds = None
    if arguments.here:
        build = partial(random_model, arguments.model, dtype=arguments.dtype)
        blocks = model.config.get_text_config().num_hidden_layers
        seconds = seconds_here(build, blocks, config, arguments.engine, *step, arguments.bits)
    elif arguments.tflops:
        seconds = found.flops / (arguments.tflops * 1e12)
    if seconds and arguments.gb_per_s:
        seconds += sum(found.messages.values()) / (arguments.gb_per_s * 1e9)
    print_table(
        f"{arguments.model}, {arguments.engine} on {arguments.gpus}: one GPU",
        ("", "GiB"),
        [
            *((name, _gib(size)) for name, size in found.memory.items()),
            ("a step in all", _gib(found.total)),
            (
                f"the final refit (its share of {config.refit_rows} rows), once, beside weights and optimizer",
                _gib(found.refit),
            ),
        ],
    )
    added = found.messages["atp"] / max(found.messages["lora"], 1)
    print_table(
        "one step",
        ("", ""),
        [
            ("TFLOP", f"{found.flops / 1e12:.1f}"),
            ("of it the generator's", f"{found.overhead_flops / found.flops:.4%}"),
            (
                "bytes read and written by lasso and generator, of all",
                f"{found.touched['atp'] / found.touched['step']:.2%}",
            ),
            ("MiB sent, plain LoRA", f"{found.messages['lora'] / 2**20:,.1f}"),
            ("MiB sent, added by pruning", f"{found.messages['atp'] / 2**20:,.1f} ({added:.2%})"),
            ("seconds", "give --tflops or --here" if seconds is None else f"{seconds:.3g}"),
        ],
    )
    needed = max(found.total, found.total - found.memory["activations"] + found.refit)
    fits = None if arguments.gpu_gib is None else needed <= arguments.gpu_gib * 2**30
    if fits is not None:
        print(f"{'fits' if fits else 'DOES NOT FIT'}: {_gib(needed)} GiB needed, {arguments.gpu_gib:g} GiB there")
    if arguments.json:
        asked = {name: value for name, value in vars(arguments).items() if name not in _NOT_ASKED}
        answers = dataclasses.asdict(found) | {"total": found.total, "seconds": seconds, "fits": fits}
        write_json(arguments.json, asked | answers)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
