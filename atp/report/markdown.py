"""Cells and answers -> `results.md`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from atp.report.answers import answers
from atp.report.summary import Cell, by_sparsity
from atp.report.tables import count, number, percent, spread, times

_COLUMNS = (
    *("strategy", "learning rate", "seeds", "perplexity", "nll", "worst row"),
    *("gap closed", "ppl / rival", "nll / dense"),
    *("scores", "/ dense"),
    *("parameters", "FLOPs/token", "prefill ms", "/ dense", "decode ms/token", "/ dense"),
    *("peak MiB", "/ dense", "train s", "overlap with start"),
)
_LEGEND = (
    "Mean and standard deviation over seeds, on held-out text; nll in nats per token. *learning rate*: where several "
    "were tried, the one with the lowest nll, of those with the most seeds. *worst row*: the highest nll of a held-out "
    "row in any run, where rows tell. *gap closed*: share of the way from the best two-stage rival's nll to dense's; "
    "*ppl / rival*: perplexity over that rival's; *scores*: on tasks, of the runs that were scored, and their mean "
    "share of dense's. Latency: median over seeds, one stream; memory: peak of training; *overlap with start*: share "
    "of the groups that the first decision prunes (a rival's before tuning, `atp`'s at `start_at`) and the final one "
    "prunes too. FLOPs count linear layers and the head, not attention scores."
)


def markdown(cells: Sequence[Cell], failed: Iterable[Mapping[str, Any]] = (), plots: Sequence[str] = ()) -> str:
    """A table per sparsity, the answers, the failed runs and the plots.

    Args:
        failed: rows whose `status` is `failed`.
        plots: file names of images beside the Markdown file.
    """
    lines = ["# Comparison", ""]
    for sparsity, here in by_sparsity(cells):
        title = "Dense" if sparsity is None else f"{sparsity * 100:.4g} % of the prunable parameters removed"
        lines += [f"## {title}", "", *_table(here), ""]
    lines += [_LEGEND, "", *_rates(cells)]
    if (jobs := max((cell.jobs for cell in cells), default=1)) > 1:
        lines += [f"Up to {jobs} runs shared the machine at a time: times and latencies are longer than alone.", ""]
    if found := answers(cells):
        lines += ["## Answers", "", *(f"- **{question}** {answer}" for question, answer in found.items()), ""]
    if bad := [f"- `{row['name']}`: exit status {row['exit_status']}: {row['error']}" for row in failed]:
        lines += ["## Failed runs", "", *bad, ""]
    for name in plots:
        lines += [f"![{name}]({name})", ""]
    return "\n".join(lines)


def _rates(cells: Sequence[Cell]) -> list[str]:
    """A section with perplexities at every learning rate, where a strategy has several."""
    rates = sorted({rate for cell in cells for rate in cell.by_rate}, key=_as_number)
    if all(len(cell.by_rate) == 1 for cell in cells):
        return []
    return [
        "## Learning rates",
        "",
        _line(["strategy", "removed", *rates]),
        _line(["---", "---:", *["---:"] * len(rates)]),
        *(_line(_at_rates(cell, rates)) for cell in cells),
        "",
        "Perplexity at each; the tables above have the best.",
        "",
    ]


def _as_number(rate: str) -> float:
    return math.inf if rate == "default" else float(rate)


def _at_rates(cell: Cell, rates: Sequence[str]) -> list[str]:
    removed = "" if cell.sparsity is None else f"{cell.sparsity * 100:.4g} %"
    return [
        f"`{cell.strategy}`",
        removed,
        *(spread(cell.by_rate[rate]) if rate in cell.by_rate else "" for rate in rates),
    ]


def _table(cells: Sequence[Cell]) -> list[str]:
    return [
        _line(_COLUMNS),
        _line(["---", *["---:"] * (len(_COLUMNS) - 1)]),
        *(_line(_texts(cell)) for cell in cells),
    ]


def _texts(cell: Cell) -> list[str]:
    return [
        f"`{cell.strategy}`",
        cell.learning_rate,
        str(cell.seeds),
        spread(cell.perplexity),
        spread(cell.nll, digits=4),
        "" if cell.worst_row_nll is None else f"{cell.worst_row_nll:.2f}",
        percent(cell.gap_closed),
        number(cell.perplexity_to_rival),
        number(cell.relative_nll),
        ", ".join(f"{task} {spread(score, digits=3)}" for task, score in cell.scores.items()),
        percent(cell.relative_performance),
        f"{cell.parameters:,.0f}",
        count(cell.flops_per_token),
        f"{cell.prefill_ms:.1f}",
        times(cell.prefill_to_dense),
        f"{cell.decode_ms:.1f}",
        times(cell.decode_to_dense),
        "" if cell.peak_memory_mib is None else f"{cell.peak_memory_mib:,.0f}",
        times(cell.memory_to_dense),
        f"{cell.train_seconds:,.1f}",
        ", ".join(f"{kind} {share:.2f}" for kind, share in (cell.overlap or {}).items()),
    ]


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
