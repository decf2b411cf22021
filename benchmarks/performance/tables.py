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


def ratio(row: Row, _baseline: Row) -> float:
    """Share of the baseline's time."""
    return float(row["ratio"])


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
        figure: of that row and the one that its file begins with.
        holds: how `figure` and `bound` must compare, "<=" or ">=".
    """

    what: str
    file: str
    bench: str
    case: str
    figure: Callable[[Row, Row], float]
    holds: str
    bound: float


def _of_both_spaces(*goals: Goal) -> list[Goal]:
    return [
        replace(goal, what=f"{goal.what}, `{space}`", file=f"{goal.file}_{space}")
        for goal in goals
        for space in ("width", "disp")
    ]


GOALS = _of_both_spaces(
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
GOALS += [
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

NOT_MEASURED = ("all of these on a GPU, with Llama-3-8B's shapes", "layer and kernels (`atp bench kernels`), on a GPU")


def part(draw: bool) -> str:
    """Goals, the plot, then every file of rows; `draw`: write the plot, too."""
    if draw:
        plots.draw(RESULTS, RESULTS / PLOT)
    lines = [
        "| 50 % of the parameters removed where no other share is named, CPU | goal | measured | limit | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    lines += [_goal_line(goal) for goal in GOALS]
    lines += [f"| {what} | | not measured | | |" for what in NOT_MEASURED]
    picture = f"![{RESULTS.name}/{PLOT}]({RESULTS.name}/{PLOT})"
    return "\n".join([*lines, "", picture, "", *(_section(path) for path in sorted(RESULTS.glob("*.csv")))])


def _goal_line(goal: Goal) -> str:
    path = RESULTS / f"{goal.file}.csv"
    rows = _rows(path) if path.exists() else []
    row = next((r for r in rows if (r["bench"], r["case"]) == (goal.bench, goal.case)), None)
    if row is None:
        return f"| {goal.what} | {goal.holds} {goal.bound} | not measured | | |"
    figure = goal.figure(row, rows[0])
    met = figure <= goal.bound if goal.holds == "<=" else figure >= goal.bound
    limit = {reached: "1", ratio: row["limit"]}.get(goal.figure, "")
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
        *(f"{float(row[name]):,.0f}" for name in ("median_ms", "p20_ms", "p80_ms")),
        f"{float(row['ratio']):.3f}",
        f"{float(row['limit']):.3f}" if row["limit"] else "",
        f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else "",
    )
    return f"| {' | '.join(cells)} |"


def _rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
