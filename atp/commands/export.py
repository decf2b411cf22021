"""`atp export RUN OUT`: a finished run's adapter and decision -> a smaller dense model in a folder of its own."""

import argparse
import json
from pathlib import Path
from typing import Any

from peft import PeftModel

from atp.callback import restore
from atp.commands.models import load_model, load_tokenizer
from atp.commands.output import print_table, write_json
from atp.errors import CheckpointError
from atp.evaluation import count_parameters, folder_bytes
from atp.export import export
from atp.recipe import ModelSettings, Recipe


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("export", help="write the pruned model of a finished run")
    parser.add_argument("run_dir", metavar="RUN", help="output folder of `atp train`, or its final/ folder")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--base", help="base model, where the run does not say or it has moved")
    parser.add_argument("--gguf-file", help="GGUF file inside --base")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load base, adapter and decision, and export."""
    final = final_folder(Path(arguments.run_dir))
    base = _base(arguments, final)
    out = Path(arguments.out)
    if out.exists() and not arguments.overwrite:
        raise CheckpointError(f"{out} exists: choose another folder or give --overwrite")
    tokenizer = load_tokenizer(base.name_or_path, base.gguf_file)
    model = PeftModel.from_pretrained(load_model(base.name_or_path, base.gguf_file, base.dtype, base.bits), str(final))
    before = count_parameters(model.get_base_model()) - _adapter_parameters(model)
    restore(model, final)
    export(model, out, processing_class=tokenizer, overwrite=arguments.overwrite)
    after = count_parameters(load_model(str(out)))
    results = {"run": str(final), "out": str(out), "parameters_before": before, "parameters_after": after}
    results["bytes"] = folder_bytes(out)
    print_table(str(out), ("", "value"), list(results.items()))
    if arguments.json:
        write_json(arguments.json, results)


def final_folder(run_dir: Path) -> Path:
    """Where the adapter of a run lies.

    Raises:
        CheckpointError: where there is none.
    """
    for folder in (run_dir / "final", run_dir):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise CheckpointError(f"{run_dir}: no final/adapter_config.json: give the output folder of a finished run")


def _base(arguments: argparse.Namespace, final: Path) -> ModelSettings:
    """Base model by the command line, else by the run's recipe, else by the adapter."""
    if arguments.base:
        return ModelSettings(arguments.base, arguments.gguf_file)
    recipe = final.parent / "recipe.yaml"
    if recipe.is_file():
        return Recipe.from_yaml(recipe).model
    name = json.loads((final / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{final}: does not say which model it tuned: give --base MODEL")
    return ModelSettings(name, arguments.gguf_file)


def _adapter_parameters(model: PeftModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
