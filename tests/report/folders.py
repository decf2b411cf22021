"""Folders of runs as `atp train` leaves them, made by hand: a model that is pruned while it learns."""

import json
import math
import random
from pathlib import Path

import yaml

BLOCKS = 30
FINGERPRINT = "5f3c9a1b7e2d4c60"


def journal(blocks=BLOCKS, logged=40, every=10, kinds=None, sparsity=0.4, seed=0):
    """The lines of a journal, one logging step after the other."""
    kinds = kinds or {"kv": 3, "mlp": 1536}
    rng = random.Random(seed)
    total, freeze = logged * every, int(logged * every * 0.6)
    taste = {
        kind: [rng.uniform(-0.25, 0.25) + 0.25 * math.cos(b / blocks * 3) for b in range(blocks)] for kind in kinds
    }
    lines = [
        {
            "step": 0,
            "run": {
                "sizes": {kind: [size] * blocks for kind, size in kinds.items()},
                "blocks": {kind: list(range(blocks)) for kind in kinds},
                "total_steps": total,
                "start_step": every,
                "freeze_step": freeze,
                "sparsity": sparsity,
                "space": "width",
                "parameters": 134_515_008,
                "prunable_parameters": 106_168_320,
            },
        },
        {"step": 0, "held_out": {"dense": 3.31, "pruned": None, "rows": 16}},
    ]
    for i in range(1, logged + 1):
        step = i * every
        asked = sparsity * min(1.0, step / (0.5 * freeze))
        kept = {
            kind: [min(max(round(size * (1 - asked - taste[kind][b] * asked)), 0), size) for b in range(blocks)]
            for kind, size in kinds.items()
        }
        frozen = step >= freeze
        loss = 2.72 + 0.9 * math.exp(-step / 90) + 0.5 * asked + rng.gauss(0, 0.03)
        log = {
            "loss": loss,
            "learning_rate": 2e-3 * (1 + math.cos(math.pi * step / total)) / 2,
            "grad_norm": 1.2 + rng.random(),
            "epoch": step / total,
            "atp/sparsity": asked * 0.97 + 0.01 if not frozen else sparsity,
            "atp/budget": asked,
            "atp/churn": 0 if frozen else 0.2 * math.exp(-step / 80),
            "atp/temperature": 0.4,
            "atp/frozen": float(frozen),
            "atp/budget_loss": 0.3 * math.exp(-step / 60),
            "atp/entropy": 0.6 * math.exp(-step / 150),
            "atp/parameters": 134_515_008 - 106_168_320 * asked,
        }
        for kind, size in kinds.items():
            log[f"atp/kept_{kind}"] = sum(kept[kind]) / (blocks * size)
            log[f"atp/lora_norm_{kind}_kept"] = 0.1 + 0.4 * step / total
            log[f"atp/lora_norm_{kind}_pruned"] = 0.1 * math.exp(-step / 70)
        lines += [{"step": step, "log": log}, {"step": step, "kept": kept}]
        if i % 4 == 0:
            dense = None if frozen else 3.31 - 0.5 * (1 - math.exp(-step / 80))
            lines.append({"step": step, "held_out": {"dense": dense, "pruned": 2.85 + 0.6 * asked, "rows": 16}})
    lines.append({"step": total, "log": {"train_loss": 2.9, "train_runtime": 753.7}})
    return lines


ALERT = {
    "step": 230,
    "alert": {
        "name": "churn near the freeze",
        "message": "12 % of the groups still change at every step, 10 steps before the freeze: a later freeze_at or a "
        "lower generator_lr usually helps",
        "value": 0.12,
    },
}


def cost(scale=1.0):
    """Size and speed."""
    return {
        "parameters": int(28_346_688 + 106_168_320 * scale),
        "flops_per_token": int(2 * (28_346_688 + 106_168_320 * scale)),
        "bytes": int(4 * (28_346_688 + 106_168_320 * scale)),
        "parts": {
            "embedding": {"parameters": 28_311_552, "ms": 0.9},
            "attention": {"parameters": int(26_542_080 * scale), "ms": 210.0 * scale},
            "mlp": {"parameters": int(79_626_240 * scale), "ms": 560.0 * scale},
            "norms": {"parameters": 35_136, "ms": 34.0},
            "head": {"parameters": 0, "ms": 180.0},
        },
        "prefill": {
            "tokens_per_second": 256 / scale,
            "latency_ms": 230 + 770 * scale,
            "calls": 5,
            "prompt_tokens": 256,
        },
        "decode": {"latency_ms": 1100 * scale, "latency_ms_per_token": 20 + 50 * scale, "generated_tokens": 16},
    }


def task(value, rows=500, metric="acc", spread=0.022, items=None, fingerprint=FINGERPRINT):
    """One score with its interval."""
    interval = {"value": value, "stderr": spread, "low": value - 1.96 * spread, "high": value + 1.96 * spread}
    made = {"metric": metric, "value": value, "stderr": spread, "rows": rows, "metrics": {metric: interval}}
    return made | {"kind": "choice", "truncated": 0, "fingerprint": fingerprint, "items": items or {}}


def metrics(scale=0.6, perplexity=24.1, accuracy=0.552, fingerprint=FINGERPRINT, items=None):
    """What a finished run measured."""
    prompt = "Question: Do statins lower the risk of a first stroke in adults older than 75?\nAnswer:"
    return {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "command": ["atp", "train", "configs/pubmedqa_smollm2_135m.yaml", "--atp.sparsity", "0.4"],
        "data": {
            "train": ["data/pubmedqa/train.jsonl", "data/hqs/train.jsonl"],
            "validation": ["data/pubmedqa/test.jsonl"],
            "fingerprints": {"train": "9a" * 8, "validation": fingerprint, "tasks/pubmedqa": fingerprint},
            "rows": {"train": 1700, "validation": 96, "tasks/pubmedqa": 500},
        },
        "training": {"train_runtime": 753.7, "train_loss": 2.83, "peak_memory_mib": 2578.9},
        "pruning": {
            "sparsity_asked": round(1 - scale, 4),
            "sparsity": round(1 - scale, 4),
            "kept_share": {"kv": 0.7, "mlp": 0.57},
            "frozen_at_step": 240,
        },
        "base": cost()
        | {"validation": quality(27.4), "tasks": {"pubmedqa": task(0.531), "hqs": task(0.214, 200, "rougeL", 0.011)}},
        "pruned": cost(scale),
        "validation": quality(perplexity),
        "tasks": {
            "pubmedqa": task(accuracy, items=items, fingerprint=fingerprint),
            "hqs": task(0.246, 200, "rougeL", 0.012),
        },
        "samples": [
            {
                "prompt": prompt,
                "reference": "yes. In pooled trials the relative risk of a first stroke was 0.81.",
                "base": "The question is about statins. Statins are a class of drugs. Statins are a class of drugs.",
                "result": "yes. Statin use was associated with a lower risk of a first stroke.",
            },
            {
                "prompt": "Summarise: My doctor put me on metformin last week and I feel dizzy since.",
                "reference": "Can metformin cause dizziness?",
                "base": "I am sorry to hear that you feel dizzy.",
                "result": "Does metformin cause dizziness in the morning?",
            },
        ],
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0"},
    }


def quality(perplexity):
    """Held-out perplexity."""
    return {"perplexity": perplexity, "nll": math.log(perplexity), "nll_stderr": 0.02, "tokens": 24_480}


def recipe(**atp):
    """The settings of a run."""
    return {
        "model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "gguf_file": None, "dtype": "float32"},
        "data": {"train": ["data/pubmedqa/train.jsonl"], "validation": "data/pubmedqa/test.jsonl", "max_length": 256},
        "output_dir": "runs/medical",
        "atp": {"sparsity": 0.4, "space": "width", "decision": "generator", "freeze_at": 0.6, "seed": 0} | atp,
        "lora": {"r": 16, "lora_alpha": 32},
        "training": {"max_steps": 400, "learning_rate": 0.002, "seed": 0},
    }


def recovery(blocks=BLOCKS, kept=True, undone=(3, 17), other=True, seed=0):
    """What `atp recover` leaves: errors that grow with depth and fall, on held-out text less than on calibration's."""
    rng = random.Random(seed)

    def errors(block, share, gap):
        calibration = 0.004 * math.exp(3.2 * block / blocks) * share * rng.uniform(0.85, 1.15)
        gap *= rng.uniform(0.5, 1.5)
        values = {"calibration": calibration, "held_out": calibration * (1 + gap), "other": calibration * (1 + 3 * gap)}
        return {text: {"error": 50 * v, "relative": v} for text, v in values.items() if other or text != "other"}

    def texts(nll, kl):
        values = {"held_out": (nll, kl), "other": (nll + 0.6, kl * 1.8)}
        return {
            text: {"nll": n, "perplexity": math.exp(n), "kl": k}
            for text, (n, k) in values.items()
            if other or text != "other"
        }

    used = {"sources": ["data/pubmedqa/train.jsonl"], "windows": 64, "tokens": 16_384, "fingerprint": FINGERPRINT}
    return {
        "method": "br+gp",
        "settings": {"epochs": 10, "learning_rate": 1e-4},
        "teacher": "runs/medical",
        "student": "runs/medical/pruned",
        "data": {"calibration": used, "held_out": used | {"windows": 32}, "other": None},
        "blocks": [
            {
                "block": block,
                "before": errors(block, 1.0, 0.08),
                "after": errors(block, 0.5, 0.35),
                "kept": block not in undone,
                "seconds": 1.2,
            }
            for block in range(blocks)
        ],
        "overall": {"before": texts(3.18, 0.31), "after": texts(3.02, 0.17), "kept": kept},
        "versions": {"torch": "2.13.0"},
        "seconds": 412.3,
        "peak_memory_mib": 2210.4,
    }


def run(folder: Path, lines=None, measured=None, settings=None, recovered=None):
    """A whole folder; `lines`, `measured` and `settings` replace what is written, `False` leaves a file out.

    `recovered`: what recovery left; nothing, unless given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if lines is not False:
        written = [*journal(), ALERT] if lines is None else lines
        (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if measured is not False:
        (folder / "metrics.json").write_text(json.dumps(metrics() if measured is None else measured))
    if settings is not False:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe() if settings is None else settings, sort_keys=False))
    if recovered is not None:
        (folder / "recovered").mkdir(exist_ok=True)
        (folder / "recovered" / "recovery.json").write_text(json.dumps(recovered))
    return folder
