"""`atp recover RUN`: the blocks of a run's pruned model are fitted to the dense tuned model's, where that helps.

What comes out is a folder like `pruned/`, with `recovery.json` beside the weights. An interrupted recovery goes on,
with `--resume`, after the last block it finished.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.commands.about import about_run, rewrite_card
from atp.commands.evaluation.sources import Tasks, find_tasks, task_files
from atp.commands.models import best_device, to_best_device
from atp.commands.output import print_table
from atp.commands.recovery.texts import Size, as_windows, read_texts
from atp.commands.recovery.work import begin, check, work_folder
from atp.commands.versions import versions_of
from atp.errors import CheckpointError, ConfigError, UnsupportedModelError
from atp.evaluation import peak_memory_mib, reset_peak_memory
from atp.export import load as load_exported
from atp.export.card import Result
from atp.export.reweighting import add_writer_biases, write_reweighted
from atp.files import check_place, keep_apart, write_json, written_beside
from atp.loading import adapter_folder, adapter_of_run, base_of, load_dense, tokenizer_of
from atp.models import load_model
from atp.recipe import DTYPES, ModelSettings, Recipe
from atp.recovery import METHODS, Outcome, RecoverySettings, recover
from atp.recovery.settings import TRAINS
from atp.recovery.texts import CALIBRATION, HELD_OUT, OTHER
from atp.report.record import RECOVERY

_EPILOG = """\
methods:
  lr        every writer (o_proj, down_proj) by ridge regression, in one look
  br        each block trained to give what the teacher's block gives
  br+gp     each block trained to give what the teacher's stream has there
  ...+cr    two blocks at a time, each trained twice (br+cr, br+gp+cr)
  lr+...    each block by lr first, then trained from there
            (lr+br, lr+br+gp, lr+br+cr, lr+br+gp+cr)

What is fitted to is --data (default: the recipe's training text); what decides
whether a block, and in the end the model, is kept is --held-out (default: the
recipe's validation text). They must not share a row.
"""


@dataclass(frozen=True)
class _Job:
    """A run's folder, checked: what it tuned, what is to be recovered, and where to."""

    run: Path
    adapter: Path
    base: ModelSettings
    pruned: Path
    out: Path
    recipe: Recipe | None


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    defaults = RecoverySettings()
    parser.add_argument("run_dir", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: RUN/recovered)")
    parser.add_argument(
        "--method", metavar="METHOD", choices=METHODS, default=defaults.method, help="see below (default %(default)s)"
    )
    parser.add_argument("--pruned", metavar="DIR", help="exported folder to recover (default: RUN/pruned)")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="another run's folder, or a model (default: RUN's own base and adapter)"
    )
    data = parser.add_argument_group("text")
    data.add_argument("--data", metavar="FILE", action="append", default=[], help="JSONL file to fit to")
    data.add_argument("--held-out", metavar="FILE", action="append", default=[], help="JSONL file that decides")
    data.add_argument("--other", metavar="FILE", action="append", default=[], help="text of another domain, looked at")
    data.add_argument("--windows", type=int, default=256, help="windows to fit to (default %(default)s)")
    data.add_argument("--length", type=int, default=1024, help="tokens a window (default %(default)s)")
    data.add_argument("--held-out-windows", type=int, default=64, help="and of other text (default %(default)s)")
    data.add_argument("--tasks", metavar="TASK", action="append", default=[], help="scored before and after: atp eval")
    data.add_argument("--task-rows", type=int, metavar="N", help="score N rows of each task, evenly spread")
    fit = parser.add_argument_group("fit", "Rate, epochs and batch are those of Adam: lr alone has none.")
    fit.add_argument("--train", choices=TRAINS, default=defaults.train, help="of a block (default %(default)s)")
    fit.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="(default %(default)s)")
    fit.add_argument("--epochs", type=int, default=defaults.epochs, help="(default %(default)s)")
    fit.add_argument("--batch-size", type=int, default=defaults.batch_size, help="windows (default %(default)s)")
    fit.add_argument("--lora-r", type=int, default=defaults.lora_r, help="for --train lora (default %(default)s)")
    fit.add_argument("--ridge", type=float, default=defaults.ridge, help="of lr (default %(default)s)")
    fit.add_argument("--biases", action="store_true", help="give o_proj and down_proj biases, which are fitted too")
    fit.add_argument(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        default=defaults.keep_best,
        help="go back where held-out text is no better (default: yes)",
    )
    fit.add_argument("--seed", type=int, default=defaults.seed, help="(default %(default)s)")
    parser.add_argument("--base", help="base model, where the run does not say or it has moved")
    parser.add_argument("--gguf-file", help="GGUF file inside the base model's folder or repository")
    parser.add_argument("--dtype", choices=DTYPES[1:], help="of the models at work (default: as they are)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier call was interrupted")
    again.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Recover, write the folder, and say what became of it."""
    start = time.perf_counter()
    settings = RecoverySettings(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(RecoverySettings)}
    )
    job = _job(arguments)
    tasks = find_tasks(arguments.tasks, arguments.task_rows)
    tokenizer = tokenizer_of(job.adapter, job.base)
    size = Size(arguments.length, arguments.windows, arguments.held_out_windows)
    files = {CALIBRATION: arguments.data, HELD_OUT: arguments.held_out, OTHER: arguments.other}
    texts = read_texts(files, job.recipe.data if job.recipe else None, tasks.local, tokenizer, size)
    about = {
        "method": settings.method,
        "settings": settings.in_use() | {"biases": arguments.biases},
        "teacher": arguments.teacher or str(job.run),
        "student": str(job.pruned),
        "dtype": arguments.dtype,
        "data": {name: texts[name].about() if name in texts else None for name in (CALIBRATION, HELD_OUT, OTHER)},
    }
    work = work_folder(job.out)
    identity = about | {"weights": _weights_of(job)}
    check(work, identity, arguments.resume, arguments.overwrite)
    measurable = reset_peak_memory()
    teacher, student = _models(arguments, job)
    if arguments.biases:
        add_writer_biases(student)
    begin(work, identity, arguments.resume)
    scores = _scores(student, tokenizer, tasks, arguments.task_rows)
    outcome = recover(teacher, student, as_windows(texts), settings, work, best_device())
    after = _scores(student, tokenizer, tasks, arguments.task_rows) if outcome.kept else scores
    results = {
        **about,
        **outcome.to_dict(),
        **({"tasks": {"before": scores, "after": after}} if scores else {}),
        "versions": versions_of("atp", "torch", "transformers", "peft"),
        "seconds": time.perf_counter() - start,
        "peak_memory_mib": peak_memory_mib() if measurable else None,
    }
    _write(job, student if outcome.kept else load_exported(job.pruned), results)
    shutil.rmtree(work, ignore_errors=True)
    _print(job, results, outcome)
    if arguments.json:
        write_json(arguments.json, results)


def _job(arguments: argparse.Namespace) -> _Job:
    folder = Path(arguments.run_dir)
    adapter = adapter_of_run(folder)
    pruned = Path(arguments.pruned or folder / "pruned")
    if not _is_exported(pruned):
        raise CheckpointError(
            f"{pruned}: no exported model here: give --pruned, or write one with: atp export {folder} {pruned}"
        )
    out = Path(arguments.out or folder / RECOVERY.parent)
    for place in (out.absolute(), out.resolve()):  # where work goes, and the folder in the end
        check_place(place.parent)
    goes_on = arguments.resume and work_folder(out).exists()  # one that was to replace `out`
    if out.exists() and not (arguments.overwrite or goes_on):
        raise CheckpointError(f"{out} exists: give --overwrite, or another --out")
    if arguments.task_rows is not None and arguments.task_rows < 1:
        raise ConfigError("--task-rows must be an integer >= 1")
    recipe = Recipe.from_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else None
    base = base_of(adapter, arguments.base, arguments.gguf_file)
    models = (folder, adapter, pruned, *base.places, arguments.teacher or folder)
    texts = [*arguments.data, *arguments.held_out, *arguments.other, *task_files(arguments.tasks)]
    for sources in (recipe.data.train, recipe.data.validation, recipe.data.calibration) if recipe else ():
        texts += [sources] if isinstance(sources, str) else sources or []
    keep_apart(out, *map(Path, (*models, *texts)))
    return _Job(folder, adapter, base, pruned, out, recipe)


def _weights_of(job: _Job) -> dict[str, Any]:
    """What tells the models at work from others that have been written to the same folders since."""
    files = [file for folder in (job.adapter, job.pruned) for file in sorted(folder.glob("*.safetensors"))]
    times = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return times | {"base": job.base.name_or_path, "gguf_file": job.base.gguf_file}


def _is_exported(folder: Path) -> bool:
    try:
        return "atp" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _models(arguments: argparse.Namespace, job: _Job) -> tuple[PreTrainedModel, PreTrainedModel]:
    if arguments.teacher is None:
        plain = arguments.base is not None
        teacher = load_dense(job.run, base=arguments.base, gguf_file=arguments.gguf_file, plain=plain)
    elif adapter_folder(Path(arguments.teacher)) is not None:
        teacher = load_dense(arguments.teacher)
    else:
        teacher = load_model(arguments.teacher)
    student = load_exported(job.pruned)
    if getattr(teacher, "is_quantized", False):
        do = (
            "another --teacher"
            if arguments.teacher
            else "--base, the run's base model, which is loaded unquantised then"
        )
        raise UnsupportedModelError(
            f"the teacher's weights are quantised, and recovery computes with plain ones: give {do}"
        )
    if arguments.dtype is not None:
        dtype = getattr(torch, arguments.dtype)
        teacher, student = teacher.to(dtype), student.to(dtype)
    return teacher, student


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, rows: int | None
) -> dict[str, Any]:
    if not (tasks.local or tasks.named):
        return {}
    found = tasks.scores(to_best_device(model), tokenizer, rows=rows)
    model.to("cpu")
    return {name: dataclasses.asdict(score) for name, score in found.items()}


def _write(job: _Job, student: PreTrainedModel, results: Mapping[str, Any]) -> None:
    """The folder, whole or not at all."""
    overall = results["overall"]
    now = overall["after" if overall["kept"] else "before"][HELD_OUT]
    held_out = results["data"][HELD_OUT]
    with written_beside(job.out) as fresh:
        write_reweighted(job.pruned, student, fresh)
        write_json(fresh / RECOVERY.name, results)
        about = about_run(job.adapter, job.base)
        names = ", ".join(Path(name).name for name in held_out["sources"])
        note = f"{held_out['tokens']:,} tokens, by which recovery was kept or not"
        result = Result(names, "perplexity", now["perplexity"], note)
        made = dict(about.settings) | ({"recovery": results["settings"]} if overall["kept"] else {})
        rewrite_card(fresh, dataclasses.replace(about, settings=made, results=(result,)))


def _print(job: _Job, results: Mapping[str, Any], outcome: Outcome) -> None:
    rows: list[list[object]] = []
    for name, before in outcome.before.items():
        after = outcome.after[name]
        for figure in ("perplexity", "nll", "kl"):
            rows.append([f"{name.replace('_', '-')} {figure}", getattr(before, figure), getattr(after, figure)])
    last = outcome.blocks[-1]
    for name, error in last.before.items():
        rows.append([f"{name.replace('_', '-')} error after the last block", error.relative, last.after[name].relative])
    for task, score in results.get("tasks", {}).get("before", {}).items():
        rows.append([f"{task} {score['metric']}", score["value"], results["tasks"]["after"][task]["value"]])
    print_table(f"{results['method']}: {job.out}", ("", "before", "after"), rows)
    kept = sum(block.kept for block in outcome.blocks)
    if outcome.kept:
        print(f"kept: {kept} of {len(outcome.blocks)} blocks were changed; the others were no better on held-out text")
    else:
        print(
            "rolled back: held-out perplexity has not become better, so the model in this folder is the one that was "
            f"there before ({kept} of {len(outcome.blocks)} blocks had come nearer to the teacher's)"
        )
