"""Rows as `atp compare` writes them, made by hand."""

import math


def row(strategy, sparsity, seed, nll, *, decode_ms=10.0, memory=1000.0, parameters=1_000_000, overlap=None, rate=None):
    """A finished run; dense where `sparsity` is None."""
    model = {
        "parameters": parameters,
        "flops_per_token": 2 * parameters,
        "prefill": {"latency_ms": 5 * decode_ms},
        "decode": {"latency_ms_per_token": decode_ms},
    }
    made = {
        "name": f"{strategy}-{sparsity}-{seed}",
        "strategy": strategy,
        "sparsity": sparsity,
        "seed": seed,
        "status": "ok",
        "training": {"train_runtime": 60.0 + seed, "peak_memory_mib": memory},
        "validation": {"nll": nll, "perplexity": math.exp(nll)},
        "versions": {"torch": "2"},
        "recipe": {"training": {} if rate is None else {"learning_rate": rate}},
    }
    if sparsity is None:
        return made | {"tuned": model}
    return made | {"pruned": model, "pruning": {"sparsity": sparsity + 0.01, "overlap_with_start": overlap}}


def failed(strategy, sparsity, seed):
    """A run that did not end well."""
    return {
        "name": f"{strategy}-{sparsity}-{seed}",
        "strategy": strategy,
        "sparsity": sparsity,
        "seed": seed,
        "status": "failed",
        "exit_status": -9,
        "error": "killed by SIGKILL",
    }


MAGNITUDE, ACTIVATION = "prune-then-tune:magnitude", "tune-then-prune:activation"

ROWS = [
    row("dense", None, 0, 2.0, decode_ms=20.0, memory=1000.0, parameters=2_000_000),
    row("dense", None, 1, 2.2, decode_ms=22.0, memory=1000.0, parameters=2_000_000),
    row("atp", 0.2, 0, 2.14),
    row("atp", 0.2, 1, 2.18),
    row("atp", 0.4, 0, 2.3, decode_ms=8.0, memory=1100.0),
    row("atp", 0.4, 1, 2.4, decode_ms=9.0, memory=None),
    row(MAGNITUDE, 0.2, 0, 2.3, overlap={"kv": 1.0, "mlp": 1.0}),
    row(MAGNITUDE, 0.4, 0, 2.9, overlap={"kv": 1.0, "mlp": 1.0}),
    row(MAGNITUDE, 0.4, 1, 3.1, overlap={"kv": 1.0, "mlp": 1.0}),
    row(ACTIVATION, 0.4, 0, 4.0, overlap={"kv": 0.5, "mlp": 0.25}),
    row(ACTIVATION, 0.4, 1, 4.0, overlap={"kv": 1.0, "mlp": 0.75}),
    failed("paper", 0.4, 0),
]
