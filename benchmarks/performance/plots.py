"""One plot of all rows: what share of the dense model's time each case takes, beside the least that its work allows."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

_BAR, _LIMIT, _DENSE = "#0072B2", "#D55E00", "#555555"
_INCHES_A_BAR = 0.32


def draw(results: Path, out: Path) -> None:
    """Bars for every case but the baseline of each `atp bench` in `results/*.csv`."""
    rows = [row | {"file": path.stem} for path in sorted(results.glob("*.csv")) for row in _cases(path)]
    figure = Figure(figsize=(9, 1.2 + _INCHES_A_BAR * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [float(row["ratio"]) for row in rows], color=_BAR, height=0.6)
    limits = [(place, float(row["limit"])) for place, row in zip(places, rows, strict=True) if row["limit"]]
    axes.plot(*zip(*((x, y) for y, x in limits), strict=True), "|", color=_LIMIT, markersize=14, markeredgewidth=2.5)
    axes.axvline(1.0, color=_DENSE, linestyle="--", linewidth=1)
    axes.set_yticks(places, [f"{row['file'].removeprefix('cpu_')}: {row['bench']}, {row['case']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the baseline's time (bar), and of its FLOPs or bytes (mark)", loc="right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def _cases(path: Path) -> list[dict[str, str]]:
    """Without baselines, which take 1, what a run's first steps take more, and what is compared with a copy."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    baselines = {row["bench"]: row["case"] for row in reversed(rows)}
    rows = [row for row in rows if not baselines[row["bench"]].startswith("copy")]
    return [row for row in rows if row["ratio"] != "1.0" and not row["case"].startswith(("first ", "copy "))]
