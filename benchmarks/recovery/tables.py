"""Tables and plots of `recovery/README.md`: what each method makes of a pruned model, and of how much text, by whom."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from atp.recovery import METHODS, RecoverySettings

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#F0E442", "#7F3C8D")
_OF_METHOD = dict(zip(METHODS, _COLORS, strict=True))
_TRIED = ("calibration", "held_out")

Row = dict[str, Any]


def part(draw: bool) -> str:
    """Both tables and plots, as far as they were measured; `draw`: write the plots, too."""
    methods, curve = read("methods.jsonl"), read("curve.jsonl")
    if draw:
        (HERE / "blocks.png").write_bytes(blocks_plot(methods))
    lines = [*by_method(methods), "", "![blocks.png](blocks.png)", ""]
    if curve and draw:
        (HERE / "curve.png").write_bytes(curve_plot(curve))
    if curve:
        lines += [*by_size(curve), "", "![curve.png](curve.png)", ""]
    return "\n".join([*lines, made_with(methods)])


def read(name: str) -> list[Row]:
    """Rows of a file; none where it has not been measured."""
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def by_method(rows: list[Row]) -> list[str]:
    """A line a run of the study; perplexities."""
    lines = [
        "| model, text, removed | fitted to | method | keeps the best | calibration error | held-out error | test "
        "| other domain | kept | seconds |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        where = _words(_setting(row))
        errors = [_change(*(_last(row, when, text) for when in ("before", "after")), ".4f") for text in _TRIED]
        qualities = [
            _change(*(_perplexity(row, when, text) for when in ("before", "after")), ".2f")
            for text in ("test", "other")
        ]
        once = "one pass" if row["epochs"] == 1 else f"{row['epochs']} passes"
        passes = "one look" if row["method"] == "lr" else f"{once}, {_steps(row)} steps"
        size = f"{row['windows']} windows, {passes}"
        kept = "" if "blocks" not in row else _kept(row)
        name = f"`{row['method']}`" + (f", {row['train']}" if row["train"] != "all" else "")
        name += f", {row['learning_rate']:g}" if row["learning_rate"] != RecoverySettings.learning_rate else ""
        best = "" if row["method"] == "lora" else "yes" if row["keep_best"] else "no"
        lines.append(
            f"| {where} | {size} | {name} | {best} | {' | '.join(errors)} | {' | '.join(qualities)} | {kept} "
            f"| {row['seconds']:,.0f} |"
        )
    return lines


def _steps(row: Row) -> int:
    """Of Adam, a block; of LoRA, in all."""
    return int(row["epochs"] * math.ceil(row["windows"] / row["batch_size"]))


def _setting(row: Row) -> tuple[str, str, str]:
    """What was pruned, on which text, and how much of it is gone."""
    return row["student"], row["domain"], f"{row['sparsity']:.0%}"


def _by_setting(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(_setting(row), []).append(row)
    return found


def _words(setting: tuple[str, str, str]) -> str:
    return ", ".join(setting).replace("%", " %")


def _last(row: Row, when: str, text: str) -> float | None:
    """Relative error of the stream after the last block."""
    return row["blocks"][-1][when][text]["relative"] if "blocks" in row else None


def _perplexity(row: Row, when: str, text: str) -> float | None:
    return math.exp(row[when][text]) if text in row[when] else None


def _change(before: float | None, after: float | None, form: str) -> str:
    return "" if before is None or after is None else f"{before:{form}} → {after:{form}}"


def _kept(row: Row) -> str:
    if not row["overall"]["kept"]:
        return "rolled back"
    return f"{sum(block['kept'] for block in row['blocks'])} of {len(row['blocks'])}"


def by_size(rows: list[Row]) -> list[str]:
    """Means and standard deviations over seeds of what recovery adds to the test text's nats a token."""
    shares = sorted({row["share"] for row in rows})
    head = " | ".join(f"{share:.0%} self-generated".replace("%", " %") for share in shares)
    lines = [f"| model, text, removed | windows | {head} |", f"| --- | ---: |{' ---: |' * len(shares)}"]
    for setting, chosen in _by_setting(rows).items():
        for windows in sorted({row["windows"] for row in chosen}):
            cells = [_spread(_gains(chosen, windows, share)) for share in shares]
            lines.append(f"| {_words(setting)} | {windows} | {' | '.join(cells)} |")
    return lines


def _gains(rows: list[Row], windows: int, share: float) -> list[float]:
    chosen = [row for row in rows if (row["windows"], row["share"]) == (windows, share)]
    return [row["after"]["test"] - row["before"]["test"] for row in chosen]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):+.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def made_with(rows: Iterable[Row]) -> str:
    versions = {f"{name} {version}" for row in rows for name, version in row["versions"].items()}
    return f"On CPUs; {', '.join(sorted(versions))}.\n"


def blocks_plot(rows: list[Row]) -> bytes:
    """Relative error of the stream after each block, before and after, on calibration (dashed) and held-out text.

    At the usual rate; of rows of one method that with the most steps.
    """
    settings = _by_setting(
        row for row in rows if "blocks" in row and row["learning_rate"] == RecoverySettings.learning_rate
    )
    lines = math.ceil(len(settings) / 2)
    figure = Figure(figsize=(9, 3.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    for axes, (setting, all_of_it) in zip(panels, settings.items(), strict=False):
        chosen = [row for row in all_of_it if not row["keep_best"]] or all_of_it
        most = {row["method"]: row for row in sorted(chosen, key=_steps)}
        _errors(axes, next(iter(most.values())), "before", "none", "#555555")
        for row in sorted(most.values(), key=lambda row: METHODS.index(row["method"])):
            _errors(axes, row, "after", row["method"], _OF_METHOD[row["method"]])
        axes.set_title(", ".join(setting), fontsize=9)
        axes.set_xlabel("block")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("relative error (dashed: calibration)")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _errors(axes: Any, row: Row, when: str, name: str, color: str) -> None:
    for text, style in (("held_out", "-"), ("calibration", "--")):
        errors = [block[when][text]["relative"] for block in row["blocks"]]
        axes.plot(range(len(errors)), errors, style, color=color, label=name if style == "-" else None)


def curve_plot(rows: list[Row]) -> bytes:
    """Nats a token added on test text, by windows, a line for each share that the model wrote itself."""
    settings = _by_setting(rows)
    figure = Figure(figsize=(4.8 * len(settings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False).flat
    for axes, (setting, chosen) in zip(panels, settings.items(), strict=True):
        sizes = sorted({row["windows"] for row in chosen})
        for color, share in zip(_COLORS, sorted({row["share"] for row in chosen}), strict=False):
            found = [(size, gains) for size in sizes if (gains := _gains(chosen, size, share))]
            spreads = [stdev(gains) if len(gains) > 1 else 0.0 for _, gains in found]
            places, means = [size for size, _ in found], [mean(gains) for _, gains in found]
            axes.errorbar(
                places, means, spreads, marker="o", capsize=3, color=color, label=f"{share:.0%} self-generated"
            )
        axes.axhline(0.0, color="#555555", linestyle="--", linewidth=1)
        axes.set_title(", ".join(setting), fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("calibration windows of 256 tokens")
        axes.set_ylabel("nats a token added on test text")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = HERE / ".plot.png"
    figure.savefig(file, dpi=120, metadata={"Software": None})
    content = file.read_bytes()
    file.unlink()
    return content
