"""Recovery studied: what each method makes of a run's pruned model, a row a line in a file of rows.

    python benchmarks/recovery/study.py RUN ROWS.jsonl --domain medical --sparsity 0.4 --methods lr,br,br+gp

Fits to windows of the recipe's training text (or of text that the model wrote, `--generated`), lets the domain's
validation text decide, and measures on its test text, which was neither fitted to nor decided by, and on the other
domain's. Run where `data/` is (see configs/README.md). The method `lora` spends the same tokens on the run's own LoRA.
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import atp
from atp.data import collator, make_windows, read_rows
from atp.evaluation import perplexity
from atp.loading import load_dense
from atp.models import load_tokenizer
from atp.recipe import Recipe
from atp.recovery import RecoverySettings, Texts, recover
from atp.subset import evenly_spread

TEXT = {"medical": "data/pubmedqa", "legal": "data/legal_text"}
VERSIONS = ("torch", "transformers")


def main() -> None:
    arguments = parse()
    study = Study(arguments)
    for seed, windows, share, method in itertools.product(
        arguments.seeds, arguments.windows, arguments.shares, arguments.methods
    ):
        start = time.perf_counter()
        row = {name: getattr(arguments, name) for name in ("student", "domain", "sparsity")}
        row |= {"method": method, "windows": windows}
        fit = ("length", "epochs", "batch_size", "keep_best", "train", "learning_rate")
        row |= {name: getattr(arguments, name) for name in fit}
        row |= {"share": share, "seed": seed} | study.row(method, windows, share, seed)
        row |= {"seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
        row["versions"] = {name: version(name) for name in VERSIONS}
        with open(arguments.rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name != "blocks"}), flush=True)


def parse() -> argparse.Namespace:
    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("rows")
    parser.add_argument("--domain", choices=TEXT, required=True)
    parser.add_argument("--sparsity", type=float, required=True, help="what the run pruned, for the row")
    parser.add_argument("--student", default="one-stage run", help="what was pruned and how, for the row")
    parser.add_argument("--methods", type=several(str), required=True, help="of atp recover, and lora")
    parser.add_argument("--windows", type=several(int), default=[64])
    parser.add_argument("--shares", type=several(float), default=[0.0], help="of windows taken from --generated")
    parser.add_argument("--seeds", type=several(int), default=[0], help="of the windows drawn, and of the fit")
    parser.add_argument("--generated", help="JSONL that the model wrote")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8, help="windows")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--train", default="all")
    parser.add_argument("--teacher", help="another run's folder")
    parser.add_argument("--keep-best", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--held-out-windows", type=int, default=64)
    parser.add_argument("--test-windows", type=int, default=96)
    parser.add_argument("--other-windows", type=int, default=32)
    return parser.parse_args()


class Study:
    """One run's models and texts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.recipe = Recipe.from_yaml(Path(arguments.run) / "recipe.yaml")
        self.tokenizer = load_tokenizer(self.recipe.model.name_or_path)
        own, foreign = TEXT[arguments.domain], next(text for name, text in TEXT.items() if name != arguments.domain)
        self.held_out = self.spread(f"{own}/validation.jsonl", arguments.held_out_windows)
        self.test = self.spread(f"{own}/test.jsonl", arguments.test_windows)
        self.other = self.spread(f"{foreign}/test.jsonl", arguments.other_windows)

    def row(self, method: str, windows: int, share: float, seed: int) -> dict[str, Any]:
        """What comes of one method."""
        fitted_to = self.calibration(windows, share, seed)
        if method == "lora":
            return self.tuned_on(fitted_to, seed)
        return self.reconstructed(method, fitted_to, seed)

    def spread(self, file: str, most: int) -> Dataset | None:
        windows = self.windows(file)
        return windows.select(evenly_spread(len(windows), most)) if most else None

    @cache  # noqa: B019  # one study a process
    def windows(self, *files: str) -> Dataset:
        return make_windows(read_rows(files), self.tokenizer, self.arguments.length, progress=False)

    def calibration(self, windows: int, share: float, seed: int) -> Dataset:
        """Windows to fit to, drawn by the seed."""
        written = round(share * windows)
        train = self.recipe.data.train
        parts = [((train,) if isinstance(train, str) else tuple(train), windows - written)]
        parts += [((self.arguments.generated,), written)] if written else []
        ids = []
        for files, count in parts:
            found = self.windows(*files)
            ids += [found[index]["input_ids"] for index in random.Random(seed).sample(range(len(found)), count)]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def reconstructed(self, method: str, fitted_to: Dataset, seed: int) -> dict[str, Any]:
        """What `atp recover` does, and quality on text that nothing was decided by."""
        arguments = self.arguments
        student = atp.load(Path(arguments.run) / "pruned")
        settings = RecoverySettings(
            method=method,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            train=arguments.train,
            keep_best=arguments.keep_best,
            seed=seed,
        )
        texts = Texts(ids(fitted_to), ids(self.held_out), None if self.other is None else ids(self.other))
        with tempfile.TemporaryDirectory() as work:
            outcome = recover(self.teacher, student, texts, settings, Path(work), quiet=True).to_dict()
        return {
            "before": self.before,
            "after": self.measured(student),
            "teacher": self.of_teacher,
            "overall": outcome["overall"],
            "blocks": outcome["blocks"],
        }

    def tuned_on(self, fitted_to: Dataset, seed: int) -> dict[str, Any]:
        """The run's LoRA trained on under its masks, as many passes over the same windows."""
        arguments = self.arguments
        model = atp.load(arguments.run)
        with tempfile.TemporaryDirectory() as folder:
            training = TrainingArguments(
                folder,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="linear",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            )
            collate = collator(self.tokenizer)
            Trainer(model=model, args=training, train_dataset=fitted_to, data_collator=collate).train()
        return {"before": self.before, "after": self.measured(model)}

    @cached_property
    def teacher(self) -> Any:
        return load_dense(self.arguments.teacher or self.arguments.run)

    @cached_property
    def of_teacher(self) -> dict[str, float]:
        return self.measured(self.teacher)

    @cached_property
    def before(self) -> dict[str, float]:
        return self.measured(atp.load(Path(self.arguments.run) / "pruned"))

    def measured(self, model: Any) -> dict[str, float]:
        """Nats a token on test text and on the other domain's."""
        parts = {"test": self.test, "other": self.other}
        return {name: perplexity(model, part, progress=False).nll for name, part in parts.items() if part is not None}


def ids(windows: Dataset) -> torch.Tensor:
    return torch.tensor(windows["input_ids"][:])


if __name__ == "__main__":
    main()
