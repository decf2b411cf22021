"""Recovery studied: what each method makes of a run's pruned model, a row a line in a file of rows.

    python benchmarks/recovery/study.py RUN ROWS.jsonl --domain medical --method br+gp

Fits to windows of the recipe's training text (or of text that the model wrote, `--generated`), lets the domain's
validation text decide, and measures on its test text, which was neither fitted to nor decided by, and on the other
domain's. Run where `data/` is (see configs/README.md). `--method lora` spends the same tokens on the run's own LoRA.
"""

import argparse
import json
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import atp
from atp.data import collator, make_windows, read_rows
from atp.evaluation import evenly_spread, peak_memory_mib, perplexity, reset_peak_memory
from atp.loading import load_dense
from atp.models import load_tokenizer
from atp.recipe import Recipe
from atp.recovery import METHODS, RecoverySettings, Texts, recover

TEXT = {"medical": "data/pubmedqa", "legal": "data/legal_text"}
TEST_WINDOWS, OTHER_WINDOWS = 96, 32


def main() -> None:
    arguments = parse()
    recipe = Recipe.from_yaml(Path(arguments.run) / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model.name_or_path)

    def windows(files, most, seed=None):
        made = make_windows(read_rows(files), tokenizer, arguments.length, progress=False)
        if seed is None:
            return made.select(evenly_spread(len(made), most))
        return made.select(random.Random(seed).sample(range(len(made)), most))

    fitted_to = calibration(arguments, recipe, windows)
    decides = windows(f"{TEXT[arguments.domain]}/validation.jsonl", 64)
    test = windows(f"{TEXT[arguments.domain]}/test.jsonl", TEST_WINDOWS)
    foreign = next(folder for domain, folder in TEXT.items() if domain != arguments.domain)
    other = windows(f"{foreign}/test.jsonl", OTHER_WINDOWS)
    row = {name: getattr(arguments, name) for name in ("domain", "sparsity", "method", "windows", "length", "seed")}
    row |= {"epochs": arguments.epochs, "share": arguments.share, "keep_best": arguments.keep_best}
    row |= {"train": arguments.train, "learning_rate": arguments.learning_rate}
    start, measurable = time.perf_counter(), reset_peak_memory()
    if arguments.method == "lora":
        row |= tune_on(arguments, fitted_to, tokenizer, test, other)
    else:
        row |= reconstruct(arguments, fitted_to, decides, test, other)
    row |= {"seconds": time.perf_counter() - start, "peak_memory_mib": peak_memory_mib() if measurable else None}
    row |= {"threads": torch.get_num_threads(), "versions": {name: version(name) for name in ("torch", "transformers")}}
    with open(arguments.rows, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "blocks"}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("rows")
    parser.add_argument("--domain", choices=TEXT, required=True)
    parser.add_argument("--method", choices=("lora", *METHODS), required=True)
    parser.add_argument("--sparsity", type=float, required=True, help="what the run pruned, for the row")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--train", default="all")
    parser.add_argument("--generated", help="JSONL that the model wrote")
    parser.add_argument("--share", type=float, default=0.0, help="of windows taken from --generated")
    parser.add_argument("--teacher", help="another run's folder")
    parser.add_argument("--keep-best", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0, help="of the windows drawn, and of the fit")
    return parser.parse_args()


def calibration(arguments, recipe, windows) -> Dataset:
    """Windows to fit to, drawn by the seed."""
    written = round(arguments.share * arguments.windows)
    parts = (
        [windows(recipe.data.train, arguments.windows - written, arguments.seed)] if written < arguments.windows else []
    )
    parts += [windows(arguments.generated, written, arguments.seed)] if written else []
    columns = {name: [value for part in parts for value in part[name][:]] for name in ("input_ids", "labels")}
    return Dataset.from_dict(columns)


def reconstruct(arguments, fitted_to, decides, test, other) -> dict:
    """What `atp recover` does, and perplexity on text that nothing was decided by."""
    teacher, student = load_dense(arguments.teacher or arguments.run), atp.load(Path(arguments.run) / "pruned")
    settings = RecoverySettings(
        method=arguments.method,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        train=arguments.train,
        keep_best=arguments.keep_best,
        seed=arguments.seed,
    )
    before = measured(student, test, other)
    texts = Texts(*(torch.tensor(part["input_ids"][:]) for part in (fitted_to, decides, other)))
    with tempfile.TemporaryDirectory() as work:
        outcome = recover(teacher, student, texts, settings, Path(work), quiet=True)
    found = outcome.to_dict()
    return {
        "before": before,
        "after": measured(student, test, other),
        "teacher": measured(teacher, test, other),
        "overall": found["overall"],
        "blocks": found["blocks"],
    }


def tune_on(arguments, fitted_to, tokenizer, test, other) -> dict:
    """The run's LoRA trained on under its masks, as many passes over the same windows."""
    model = atp.load(arguments.run)
    before = measured(model, test, other)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=2,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=arguments.seed,
        )
        Trainer(model=model, args=training, train_dataset=fitted_to, data_collator=collator(tokenizer)).train()
    return {"before": before, "after": measured(model, test, other)}


def measured(model, test, other) -> dict:
    """Nats a token on test text and on the other domain's."""
    return {name: perplexity(model, part, progress=False).nll for name, part in (("test", test), ("other", other))}


if __name__ == "__main__":
    main()
