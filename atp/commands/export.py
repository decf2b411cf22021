"""`atp export RUN OUT`: a finished run's adapter and decision -> a smaller model, in the format that its user needs."""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from atp.commands.about import about_run
from atp.commands.models import load_shell
from atp.commands.output import print_table
from atp.errors import ATPError, CheckpointError, ConfigError
from atp.evaluation import count_parameters, folder_bytes
from atp.export import export, export_adapter
from atp.export.card import About
from atp.files import check_place, keep_apart, write_json
from atp.loading import adapter_folder, base_of, load, tokenizer_of
from atp.structure.live import is_adapters
from atp.training.state import FOLDER

FORMATS = ("hf", "gguf", "adapter")
_TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = (*_TORCH_DTYPES, "q8_0")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help="output folder of `atp train`, or its final/ folder")
    parser.add_argument("out", metavar="OUT", help="folder to write; a file for gguf")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf: a Hugging Face folder, LoRA merged (the default); gguf: one file for llama.cpp, where RUN may be an "
        "exported folder; adapter: OUT/base and, as a PEFT adapter on it, OUT/adapter",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights: by default the base model's, or, of a gguf's matrices, f16; q8_0 for gguf only",
    )
    parser.add_argument("--base", help="base model, where the run does not say or it has moved")
    parser.add_argument("--gguf-file", help="GGUF file inside --base")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load base, adapter and decision, and export; or only convert what has been exported."""
    source, out = Path(arguments.run_dir), Path(arguments.out)
    _check(arguments, out)
    adapter = adapter_folder(source)
    if adapter is None and arguments.format == "gguf" and (source / "config.json").is_file():
        results = {"run": str(source), **_convert(source, out, arguments)}
    elif adapter is None:
        also = ", or an exported folder" if arguments.format == "gguf" else ""
        raise CheckpointError(f"{source}: no final/adapter_config.json: give the output folder of a finished run{also}")
    else:
        results = {"run": str(adapter), **_export(arguments, adapter, out)}
    results["bytes"] = out.stat().st_size if out.is_file() else folder_bytes(out)
    print_table(str(out), ("", "value"), list(results.items()))
    if arguments.json:
        write_json(arguments.json, results)


def _check(arguments: argparse.Namespace, out: Path) -> None:
    if arguments.format == "adapter" and arguments.dtype:
        raise ConfigError("--dtype is not for --format adapter, which keeps the base model's dtype: leave it out")
    if arguments.format == "hf" and arguments.dtype not in (None, *_TORCH_DTYPES):
        raise ConfigError(f"--dtype {arguments.dtype} is for --format gguf: choose from {', '.join(_TORCH_DTYPES)}")
    if arguments.format == "gguf" and (out.suffix != ".gguf" or out.is_dir()):
        raise ConfigError(f"{out}: a gguf is one file: give a name that ends in .gguf")
    keep_apart(out, Path(arguments.run_dir))
    check_place(out.resolve().parent)
    if arguments.format != "gguf":
        check_place(out)
    if out.exists() and not arguments.overwrite:
        raise CheckpointError(f"{out} exists: choose another name or give --overwrite")


def _export(arguments: argparse.Namespace, adapter: Path, out: Path) -> dict[str, Any]:
    if not (adapter / FOLDER).is_dir():
        raise CheckpointError(
            f"{adapter} is an adapter without a decision: give a run's output folder; one of `--format adapter` is "
            "pruned already, and atp.load(...).merge_and_unload() merges it"
        )
    base = base_of(adapter, arguments.base, arguments.gguf_file)
    keep_apart(out, adapter, *base.places)
    tokenizer = tokenizer_of(adapter, base)
    model = load(adapter, base=arguments.base, gguf_file=arguments.gguf_file)
    before = count_parameters(model.get_base_model()) - _adapter_parameters(model)
    about = about_run(adapter, base)
    written = {"out": str(out), "parameters_before": before}
    if arguments.format == "gguf":
        return written | _gguf(model, out, tokenizer, about, arguments)
    if arguments.format == "adapter":
        export_adapter(model, out, processing_class=tokenizer, overwrite=arguments.overwrite, about=about)
        return written | {"parameters_after": _parameters(out / "base")}
    dtype = _TORCH_DTYPES.get(arguments.dtype)
    export(model, out, processing_class=tokenizer, overwrite=arguments.overwrite, about=about, dtype=dtype)
    return written | {"parameters_after": _parameters(out)}


def _gguf(
    model: PeftModel, out: Path, tokenizer: PreTrainedTokenizerBase, about: About, arguments: argparse.Namespace
) -> dict[str, Any]:
    """By way of a Hugging Face folder beside `out`, which goes again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as beside:
        folder = export(model, Path(beside) / out.stem, processing_class=tokenizer, about=about)
        return {"parameters_after": _parameters(folder)} | _convert(folder, out, arguments)


def _convert(folder: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    try:
        writer = importlib.import_module("atp.export.gguf")
    except ModuleNotFoundError as error:
        raise ATPError(f"gguf cannot be written here ({error}): pip install 'atp[gguf]'") from None
    dtype = arguments.dtype or "f16"
    writer.write_gguf(folder, out, dtype, overwrite=arguments.overwrite)
    return {"out": str(out), "dtype": dtype}


def _parameters(folder: Path) -> int:
    """Of an exported folder, whose weights are not loaded for it."""
    return count_parameters(load_shell(str(folder)))


def _adapter_parameters(model: PeftModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if is_adapters(name))
