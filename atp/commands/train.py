"""`atp train CONFIG.yaml`: one recipe -> a tuned and pruned model; also under `accelerate launch -m atp train ...`.

A recipe with `atp: false` gives the tuned model only: plain LoRA, the dense baseline.
Everything a user can get wrong is checked before the first weight is loaded. Only the first process writes and prints.
"""

import argparse
import dataclasses
import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from atp.callback import ATPCallback, save_adapters
from atp.commands.about import about_recipe, rewrite_card
from atp.commands.datasets import RunData, load_data
from atp.commands.measurement import PeakMemoryCallback
from atp.commands.models import computes_in_bf16, to_best_device
from atp.commands.output import flatten, print_table, write_json, write_text
from atp.data import collator
from atp.errors import CheckpointError, ConfigError
from atp.evaluation import folder_bytes, model_cost, perplexity, score_task
from atp.models import load_model, load_tokenizer
from atp.recipe import Recipe
from atp.structure.sharding import is_sharded
from atp.training.state import set_aside_unfinished

logger = logging.getLogger(__name__)

_RUN_FILES = (
    *("checkpoint-*", "_unfinished-checkpoint-*", "final", "pruned"),
    *("metrics.json", "recipe.yaml", "report.html"),
)


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="tune and prune by a recipe",
        epilog="Any setting of the recipe can be given as --section.key value, e.g. --atp.sparsity 0.5.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="recipe; see configs/README.md")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    again.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in output_dir")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run, takes_overrides=True)


def run(arguments: argparse.Namespace) -> None:
    """Train, export, measure what came out, and write `metrics.json`."""
    recipe = Recipe.from_yaml(arguments.config, arguments.overrides)
    lora = recipe.lora_config()
    training = recipe.training_arguments()
    first = training.process_index == 0
    with training.main_process_first(local=False, desc="checkpoints"):
        checkpoint = _checkpoint(Path(recipe.output_dir), arguments.resume, arguments.overwrite, first)
    if first and training.bf16 and not computes_in_bf16():
        logger.warning("atp: this CPU has no bfloat16 arithmetic: --training.bf16 false is several times faster here")
    tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.model.gguf_file)
    with _first_process_first(training):
        data = load_data(recipe.data, tokenizer, progress=first)
    model = get_peft_model(_base_model(recipe), lora)
    if first:
        _prepare(Path(recipe.output_dir), recipe, arguments.overwrite)
    memory = PeakMemoryCallback()
    pruning = ATPCallback(recipe.atp, calibration_dataset=data.calibration) if recipe.atp else None
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[memory, pruning] if pruning else [memory],
    )
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if not pruning:
        save_adapters(tuned, Path(recipe.output_dir) / "final", first)
    unset_hf_deepspeed_config()  # what is loaded from now on is the first process's alone, not in ZeRO-3's parts
    if first:
        model, cost = (_pruned if pruning else _merged)(recipe, tuned)
        results = {
            "model": recipe.model.name_or_path,
            "training": outcome.metrics | {"peak_memory_mib": memory.peak_mib},
            **({"pruning": pruning.summary()} if pruning else {}),
            **cost,
            **_quality(model, tokenizer, data),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        }
        write_json(Path(recipe.output_dir) / "metrics.json", results)
        if pruning and recipe.atp and recipe.atp.export:
            rewrite_card(Path(recipe.output_dir) / "pruned", about_recipe(recipe, results))
        print_table(recipe.output_dir, ("", "value"), flatten(results))
        if arguments.json:
            write_json(arguments.json, results)


def _checkpoint(output_dir: Path, resume: bool, overwrite: bool, first: bool) -> str | None:
    """The checkpoint to go on from; a folder that holds a run is refused unless the user says what to do with it."""
    if resume and first:
        set_aside_unfinished(output_dir)
    found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if resume:
        return _intact(Path(found)) if found else None
    if not overwrite and (found or (output_dir / "metrics.json").exists() or (output_dir / "pruned").exists()):
        raise ConfigError(
            f"output_dir {output_dir} already holds a run: give --resume to go on, --overwrite to start again, "
            "or another --output_dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir {output_dir} is a file: give a folder")
    return None


def _intact(checkpoint: Path) -> str:
    """The path, if the Trainer's own files in it can be opened; the callback checks its own."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, framework="pt"):
                pass
        broken = [file for file in checkpoint.glob("*.pt") if not zipfile.is_zipfile(file)]
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint} is damaged ({error}): remove it to go on from the one before") from None
    if broken:
        raise CheckpointError(f"{broken[0]} is cut short: remove {checkpoint} to go on from the one before")
    return str(checkpoint)


def _prepare(output_dir: Path, recipe: Recipe, overwrite: bool) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    for pattern in _RUN_FILES if overwrite else ():
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(output_dir / "recipe.yaml", recipe.to_yaml())


@contextmanager
def _first_process_first(training: TrainingArguments) -> Iterator[None]:
    """The first process fills the download cache, the others then read it."""
    with training.main_process_first(desc="data"):
        yield


def _base_model(recipe: Recipe) -> PreTrainedModel:
    base = recipe.model
    return load_model(base.name_or_path, base.gguf_file, base.dtype, base.bits)


def _pruned(recipe: Recipe, masked: PeftModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The exported folder as a stranger loads it, and what it costs; without one, the masked model."""
    folder = Path(recipe.output_dir) / "pruned"
    if not folder.is_dir():
        return masked, {}
    model = to_best_device(load_model(str(folder)))
    return model, {"pruned": model_cost(model) | {"bytes": folder_bytes(folder)}}


def _merged(recipe: Recipe, tuned: PeftModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merge the adapter as an export would: the dense model, and what it costs."""
    if any(is_sharded(parameter) for parameter in tuned.parameters()):  # the other processes have gone
        tuned = PeftModel.from_pretrained(_base_model(recipe), str(Path(recipe.output_dir) / "final"))
    model = tuned.merge_and_unload()
    return model, {"tuned": model_cost(model)}


def _quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> dict[str, Any]:
    """Perplexity on held-out text and scores on tasks, as far as the recipe names them."""
    found: dict[str, Any] = {}
    if data.validation is not None:
        found["validation"] = dataclasses.asdict(perplexity(model, data.validation))
    if data.tasks:
        scores = {name: score_task(name, rows, model, tokenizer) for name, rows in data.tasks.items()}
        found["tasks"] = {name: dataclasses.asdict(score) for name, score in scores.items()}
    return found
