"""Tables and plot of `performance/README.md`: every goal with what was measured, then the rows of every `atp bench`."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from performance import plots

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PLOT = "shares.png"

Row = dict[str, str]


def ratio(row: Row, baseline: Row) -> float:
    """Share of the baseline's time: the median over rounds where the row has that, else that of medians."""
    if baseline["ratio"] == "1.0":
        return float(row["ratio"])
    return float(row["median_ms"]) / float(baseline["median_ms"])


def speed(row: Row, baseline: Row) -> float:
    """How often it goes into the baseline's time."""
    return 1 / ratio(row, baseline)


def reached(row: Row, _baseline: Row) -> float:
    """Share of the speed-up that the remaining FLOPs or bytes allow."""
    return float(row["limit"]) / float(row["ratio"])


def memory(row: Row, baseline: Row) -> float:
    """Share of the baseline's peak memory."""
    return float(row["peak_mib"]) / float(baseline["peak_mib"])


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted of one row of `results/FILE.csv`.

    Attributes:
        figure: of that row and its baseline.
        holds: how `figure` and `bound` must compare, "<=" or ">=".
        over: the case that is the baseline; the first of that bench in the file if None.
    """

    what: str
    file: str
    bench: str
    case: str
    figure: Callable[[Row, Row], float]
    holds: str
    bound: float
    over: str | None = None


def _of_both_spaces(*goals: Goal) -> list[Goal]:
    return [
        replace(goal, what=f"{goal.what}, `{space}`", file=f"{goal.file}_{space}")
        for goal in goals
        for space in ("width", "disp")
    ]


CPU = _of_both_spaces(
    Goal(
        "step after the freeze, share of dense LoRA's time",
        "cpu_train_step",
        "train-step",
        "after the freeze",
        ratio,
        "<=",
        0.67,
    ),
    Goal("step before the freeze, likewise", "cpu_train_step", "train-step", "before the freeze", ratio, "<=", 1.15),
    Goal(
        "prefill of 512 tokens, share of the speed-up that is there",
        "cpu_infer",
        "prefill",
        "pruned",
        reached,
        ">=",
        0.9,
    ),
    Goal("prefill of 128 tokens, likewise", "cpu_infer_128", "prefill", "pruned", reached, ">=", 0.9),
    Goal("decode, likewise", "cpu_infer", "decode", "pruned", reached, ">=", 0.85),
)
CPU += [
    Goal(
        "export of Llama-3-8B's blocks, share of a plain save's time",
        "cpu_export_width",
        "export",
        "export",
        ratio,
        "<=",
        2.0,
    ),
    Goal(
        "whole run of 1,000 steps at 40 %, frozen at half of them, beside plain LoRA: time",
        "cpu_run_width",
        "run",
        "ATP",
        ratio,
        "<=",
        1.0,
    ),
    Goal("likewise, peak memory", "cpu_run_width", "run", "ATP", memory, "<=", 1.1),
]

KERNELS, INDEXED = "compact, kernels", "compact, index operations"
GPU = _of_both_spaces(
    Goal(
        "step of 8,192 tokens after the freeze, share of dense LoRA's time",
        "gpu_train_step",
        "train-step",
        "after the freeze",
        ratio,
        "<=",
        0.6,
    ),
    Goal("step before the freeze, likewise", "gpu_train_step", "train-step", "before the freeze", ratio, "<=", 1.15),
    Goal(
        "prefill of 4,096 tokens, share of the speed-up that is there",
        "gpu_prefill",
        "prefill",
        "pruned",
        reached,
        ">=",
        0.9,
    ),
    Goal("decode, likewise", "gpu_decode", "decode", "pruned", reached, ">=", 0.85),
)
GPU += [
    Goal("a layer with kernels, `disp`: speed over dense", "gpu_kernels_disp", "layer", KERNELS, speed, ">=", 1.7),
    Goal(
        "share of the time of its products alone",
        "gpu_kernels_disp",
        "layer",
        KERNELS,
        ratio,
        "<=",
        1.03,
        "compact, products alone",
    ),
    Goal("speed over PyTorch's index operations", "gpu_kernels_disp", "layer", KERNELS, speed, ">=", 1.2, INDEXED),
    Goal(
        "a layer's products in decoding, share of the time of a copy of as many bytes",
        "gpu_kernels_disp",
        "decode, one token",
        "kernels",
        ratio,
        "<=",
        1.35,
        "copy of as many bytes",
    ),
    Goal(
        "add + norm + gather, share of a copy's bandwidth",
        "gpu_kernels_disp",
        "add + norm + gather",
        "kernels",
        speed,
        ">=",
        0.8,
    ),
]


def part(draw: bool) -> str:
    """Goals, the plot, then every file of rows; `draw`: write the plot, too."""
    if draw:
        plots.draw(RESULTS, RESULTS / PLOT)
    lines = [
        *_goals("50 % of the parameters removed where no other share is named, CPU", CPU),
        "",
        *_goals("50 %, one GPU, Llama-3-8B's shapes, bfloat16", GPU),
    ]
    picture = f"![{RESULTS.name}/{PLOT}]({RESULTS.name}/{PLOT})"
    return "\n".join([*lines, "", picture, "", *(_section(path) for path in sorted(RESULTS.glob("*.csv")))])


def _goals(title: str, goals: Iterable[Goal]) -> list[str]:
    head = [f"| {title} | goal | measured | limit | |", "| --- | ---: | ---: | ---: | --- |"]
    return head + [_goal_line(goal) for goal in goals]


def _goal_line(goal: Goal) -> str:
    path = RESULTS / f"{goal.file}.csv"
    rows = [row for row in _rows(path) if row["bench"] == goal.bench] if path.exists() else []
    row = next((r for r in rows if r["case"] == goal.case), None)
    if row is None:
        return f"| {goal.what} | {goal.holds} {goal.bound} | not measured | | |"
    figure = goal.figure(row, next(r for r in rows if goal.over in (None, r["case"])))
    met = figure <= goal.bound if goal.holds == "<=" else figure >= goal.bound
    limit = "1" if goal.over else {reached: "1", ratio: row["limit"]}.get(goal.figure, "")
    limit = f"{float(limit):.3f}" if limit else ""
    return f"| {goal.what} | {goal.holds} {goal.bound} | {figure:.3f} | {limit} | {'yes' if met else 'no'} |"


def _section(path: Path) -> str:
    rows = _rows(path)
    first = rows[0]
    setting = ", ".join(
        f"{name} {first[name]}"
        for name in ("config", "layers", "space", "sparsity", "dtype", "rows", "length", "tokens", "steps", "freeze_at")
        if first.get(name)
    )
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "transformers", "peft"))
    machine = (
        f"{first['processor']}, {first['threads']} threads, matmul {float(first['matmul_tflops']):.3g} TFLOP/s, "
        f"copy {float(first['copy_gb_per_s']):.3g} GB/s; {versions}"
    )
    lines = ["| bench | case | median ms | p20 | p80 | ratio | limit | peak MiB |", f"| --- | --- |{' ---: |' * 6}"]
    lines += [_row_line(row) for row in rows]
    return "\n".join([f"### {path.stem}", "", f"{setting}; {first['calls']} calls. {machine}.", "", *lines, ""])


def _row_line(row: Row) -> str:
    cells: Iterable[str] = (
        row["bench"],
        row["case"],
        *(_milliseconds(float(row[name])) for name in ("median_ms", "p20_ms", "p80_ms")),
        f"{float(row['ratio']):.3f}",
        f"{float(row['limit']):.3f}" if row["limit"] else "",
        f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else "",
    )
    return f"| {' | '.join(cells)} |"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
