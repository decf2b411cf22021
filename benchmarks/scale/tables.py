"""Tables of `scale/README.md`: steps on every engine beside what `atp plan` says; a run's stops; large models."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"

Row = dict[str, Any]


def part() -> str:
    """All tables."""
    return "\n".join(
        [*measured(read("cpu.jsonl")), "", *stops(read("stops.jsonl")), "", *planned(read("plans.jsonl")), ""]
    )


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def measured(rows: list[Row]) -> list[str]:
    lines = [
        "| engine | shapes | MiB | planned | / measured | s a step | planned | / measured | callback's share |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory, seconds = (row[f"plan_{what}"] / row[what] for what in ("mib", "seconds"))
        lines.append(
            f"| {row['engine']} | {shapes(row)} | {row['mib']:,.0f} | {row['plan_mib']:,.0f} | {memory:.2f} "
            f"| {row['seconds']:.2f} | {row['plan_seconds']:.2f} | {seconds:.2f} | {row['callback']:.1%} |"
        )
    first = rows[0]
    made = f"{first['processes']} processes, {first['threads']} thread each, {first['device']}; torch {first['torch']}"
    return [*lines, "", f"{made}, transformers {first['transformers']}."]


def shapes(row: Row) -> str:
    blocks = f", {row['layers']} blocks" if row["layers"] else ""
    again = ", checkpointing" if row["gradient_checkpointing"] else ""
    return f"{row['model']}{blocks}, {row['rows']} x {row['length']}{again}"


def stops(rows: list[Row]) -> list[str]:
    alone = rows[0]
    lines = [
        "| processes | scores, s | / one | refit, s | / one |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        scores, refit = (f"{row[what]:.1f} | {row[what] / alone[what]:.2f}" for what in ("scores", "refit"))
        lines.append(f"| {row['processes']} | {scores} | {refit} |")
    rows_of = f"{alone['score_rows']} rows scored and {alone['refit_rows']} refitted to, of {alone['length']} tokens"
    made = f"{alone['model']}, {alone['layers']} blocks, {rows_of}; {alone['threads']} thread each, {alone['device']}"
    return [*lines, "", f"{made}; torch {alone['torch']}, transformers {alone['transformers']}."]


def planned(rows: list[Row]) -> list[str]:
    lines = [
        "| model | engine, GPUs | weights | gathered | activations | a step | refit | TFLOP | GiB sent | by pruning |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory, sent = row["memory"], row["messages"]
        sizes = (memory["base weights"], memory.get("gathered", 0), memory["activations"], row["total"], row["refit"])
        gib = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
        bits = f", {row['bits']} bits" if row["bits"] else ""
        lines.append(
            f"| {row['model']}{bits} | {row['engine']}, {row['gpus']} | {gib} | {row['flops'] / 1e12:,.0f} "
            f"| {sent['lora'] / 2**30:.1f} | {sent['atp'] / max(sent['lora'], 1):.2%} |"
        )
    return lines
