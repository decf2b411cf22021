"""`atp train CONFIG.yaml`: one recipe -> a tuned and pruned model; also under `accelerate launch -m atp train ...`.

A recipe with `atp: false` gives the tuned model only: plain LoRA, the dense baseline.
Everything a user can get wrong is checked before the first weight is loaded. Only the first process writes and prints.
"""

import argparse
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks, unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from atp.callback import ATPCallback, save_adapters
from atp.commands.about import about_recipe, rewrite_card
from atp.commands.datasets import load_data
from atp.commands.measurement import JournalCallback, OwnIntervalsCallback, PeakMemoryCallback
from atp.commands.models import computes_in_bf16
from atp.commands.report import print_report
from atp.commands.results import base_model, base_results, run_results
from atp.data import collator
from atp.errors import CheckpointError, ConfigError
from atp.files import alone_in, begun_beside, keep_apart, remove, write_json, write_text
from atp.journal import JOURNAL
from atp.models import load_tokenizer
from atp.recipe import Recipe, refused_by_library
from atp.report import REPORT, write_report
from atp.report.values import changes, flat
from atp.training.state import set_aside_unfinished

logger = logging.getLogger(__name__)

_RUN_FILES = (
    *("checkpoint-*", "_unfinished-checkpoint-*", "final", "pruned", "recovered"),
    *(".final.*", ".pruned.*", ".recovered.*"),  # of what was interrupted
    *("metrics.json", "recipe.yaml", REPORT, JOURNAL),
)
_MEASURED = {"validation", "validation_split", "validation_windows", "tasks", "task_rows"}
"""Of `data`, what is looked at and not learned."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Any setting of the recipe can be given as --section.key value, e.g. --atp.sparsity 0.5."
    parser.add_argument("config", metavar="CONFIG.yaml", help="recipe; see configs/README.md")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    again.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in output_dir")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run, takes_overrides=True, takes_processes=True)


def run(arguments: argparse.Namespace) -> None:
    """Train, export, measure what came out, and write `metrics.json`."""
    recipe = Recipe.from_yaml(arguments.config, arguments.overrides)
    lora = recipe.lora_config()
    training = recipe.training_arguments()
    if training.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ConfigError(
            f"training: metric_for_best_model={training.metric_for_best_model} is not allowed: evaluations measure the "
            "loss only: leave it out"
        )
    _require_trackers(training)
    _take_one_gpu(training)
    first = training.process_index == 0
    if first:
        _say_that_nothing_is_sharded(training)
    with alone_in(Path(recipe.output_dir), "atp train", "--output_dir") if first else nullcontext():
        _train(arguments, recipe, lora, training, first)


def _train(
    arguments: argparse.Namespace, recipe: Recipe, lora: LoraConfig, training: TrainingArguments, first: bool
) -> None:
    with training.main_process_first(local=False, desc="checkpoints"):
        checkpoint = _checkpoint(
            Path(recipe.output_dir), arguments.resume, arguments.overwrite, first, training.save_on_each_node
        )
        if arguments.overwrite:
            _keep_what_is_read(recipe)
    _require_unfinished(recipe, checkpoint)
    _require_same(recipe, checkpoint)
    if first and training.bf16 and not computes_in_bf16():
        logger.warning("atp: this CPU has no bfloat16 arithmetic: --training.bf16 false is several times faster here")
    tokenizer = load_tokenizer(recipe.model.name_or_path, recipe.model.gguf_file)
    with _first_process_first(training):
        data = load_data(recipe.data, tokenizer, progress=first)
    base = base_model(recipe)
    measured = base_results(recipe, base, tokenizer, data) if recipe.measure_base and training.world_size == 1 else None
    set_seed(training.seed)  # the adapter's first weights are the seed's too
    with refused_by_library("lora", ValueError, TypeError):
        model = get_peft_model(base, lora)
    memory = PeakMemoryCallback()
    watched = data.validation if recipe.measure_base else None
    pruning = (
        ATPCallback(recipe.atp, data.calibration, held_out_dataset=watched, report=False)
        if recipe.atp
        else JournalCallback()
    )
    with refused_by_library("training", ValueError):
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=collator(tokenizer),
            processing_class=tokenizer,
            callbacks=[OwnIntervalsCallback(), memory, pruning],
        )
    if first:
        _prepare(Path(recipe.output_dir), arguments.overwrite)
        if checkpoint is None:
            _write_recipe(recipe)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if not recipe.atp:
        save_adapters(tuned, Path(recipe.output_dir) / "final", first)
    if first and checkpoint is not None:
        _write_recipe(recipe)  # of a run that goes on not before it has been found to be the same
    unset_hf_deepspeed_config()  # what is loaded from now on is the first process's alone, not in ZeRO-3's parts
    if first:
        results = {
            "model": recipe.model.name_or_path,
            "command": ["atp", *arguments.words],
            "training": outcome.metrics | {"peak_memory_mib": memory.peak_mib},
            **({"pruning": pruning.summary()} if isinstance(pruning, ATPCallback) else {}),
            **run_results(recipe, tuned, tokenizer, data, measured),
        }
        _write(recipe, results, arguments.json)


def _write(recipe: Recipe, results: dict[str, Any], also: str | None) -> None:
    """The model card anew, `metrics.json`, the file that the user wants besides, and the page."""
    if recipe.atp and recipe.atp.export:
        rewrite_card(Path(recipe.output_dir) / "pruned", about_recipe(recipe, results))
    write_json(Path(recipe.output_dir) / "metrics.json", results)  # from now on it has ended
    if also:
        write_json(also, results)
    print_report(write_report(recipe.output_dir))


def _require_trackers(training: TrainingArguments) -> None:
    """The Trainer makes them too, when the model has been loaded and measured."""
    with refused_by_library("training", ValueError, RuntimeError, ImportError):
        for tracker in get_reporting_integration_callbacks(training.report_to):
            tracker()


def _take_one_gpu(training: TrainingArguments) -> None:
    """Not all: by `nn.DataParallel` the Trainer would train on more rows a step, and masks cannot follow."""
    if training.n_gpu > 1:
        logger.warning(
            "atp: this run computes on one of %d GPUs: start it with accelerate launch to use all", training.n_gpu
        )
        training._n_gpu = 1  # as the Trainer itself does for models that several GPUs hold


def _say_that_nothing_is_sharded(training: TrainingArguments) -> None:
    """On CPUs accelerate makes plain DDP of FSDP, without a word."""
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and training.distributed_state.distributed_type is DistributedType.MULTI_CPU:
        logger.warning("atp: accelerate leaves FSDP out on CPUs: each process holds the whole model, as in DDP")


def _keep_what_is_read(recipe: Recipe) -> None:
    for path in _left_by_a_run(Path(recipe.output_dir)):
        keep_apart(path, *recipe.model.places)


def _checkpoint(output_dir: Path, resume: bool, overwrite: bool, first: bool, each_machine: bool) -> str | None:
    """The checkpoint to go on from; a folder that holds a run is refused unless the user says what to do with it."""
    if resume and first:
        set_aside_unfinished(output_dir, each_machine, plain=True)
    found = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if resume and found:
        return _intact(Path(found))
    finished = (output_dir / "metrics.json").exists() or (output_dir / "pruned").exists()
    if finished and resume:
        raise ConfigError(
            f"output_dir {output_dir} holds a finished run and no checkpoint to go on from: give --overwrite to start "
            f"again, or another --output_dir{_page_of(output_dir)}"
        )
    if (found or finished) and not overwrite:
        goes_on = "--resume to go on, " if found else ""
        raise ConfigError(
            f"output_dir {output_dir} already holds a run: give {goes_on}--overwrite to start again, or another "
            "--output_dir"
        )
    if resume and first:
        logger.warning("atp: %s holds nothing to go on from: this run begins with the first step", output_dir)
    return None


def _page_of(output_dir: Path) -> str:
    """How to make the page of a run that was stopped after its last result."""
    missing = (output_dir / "metrics.json").exists() and not (output_dir / REPORT).exists()
    return f"; its page is missing: atp report {output_dir} writes it" if missing else ""


def _require_unfinished(recipe: Recipe, checkpoint: str | None) -> None:
    """Where nothing is left the Trainer takes one more step, and measures again."""
    if checkpoint is None or not (Path(recipe.output_dir) / "metrics.json").exists():
        return
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    asked = recipe.training.get("max_steps", -1)
    if state["global_step"] >= max(state["max_steps"], asked) and (recipe.atp or asked > 0):
        raise ConfigError(
            f"output_dir {recipe.output_dir} holds a finished run: nothing is left to go on with; give --overwrite to "
            f"start again, or another --output_dir{_page_of(Path(recipe.output_dir))}"
        )


def _require_same(recipe: Recipe, checkpoint: str | None) -> None:
    """The callback sees to its own settings; the rest of what has been learned so far was of the recipe beside it."""
    kept = Path(recipe.output_dir) / "recipe.yaml"
    if checkpoint is None or not kept.is_file():
        return
    try:
        there = Recipe.from_yaml(kept)
    except ConfigError:  # another version's
        return
    if changed := changes(_learned(there), _learned(recipe)):
        raise ConfigError(
            f"{kept} is of another run ({', '.join(changed[:3])}): go on with the same settings, as by "
            f"atp train {kept} --resume; where something has only moved, say so in that file"
        )


def _learned(recipe: Recipe) -> dict[str, Any]:
    """Model, adapter and training rows, and whether anything is pruned: flat."""
    values = recipe.to_dict()
    data = {name: value for name, value in values["data"].items() if name not in _MEASURED}
    return flat({"model": values["model"], "data": data, "lora": values["lora"], "atp": recipe.atp is not None})


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


def _prepare(output_dir: Path, overwrite: bool) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    begun = [path for name in ("final", "pruned") for path in begun_beside(output_dir / name)]
    for path in _left_by_a_run(output_dir) if overwrite else begun:
        remove(path)


def _left_by_a_run(output_dir: Path) -> list[Path]:
    return [path for pattern in _RUN_FILES for path in output_dir.glob(pattern)]


def _write_recipe(recipe: Recipe) -> None:
    place = Path(recipe.output_dir) / "recipe.yaml"
    if place.is_symlink():  # to what a user may have written by hand
        place.unlink()
    write_text(place, recipe.to_yaml())


@contextmanager
def _first_process_first(training: TrainingArguments) -> Iterator[None]:
    """The first process fills the download cache, the others then read it."""
    with training.main_process_first(desc="data"):
        yield
