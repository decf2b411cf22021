"""Cells -> PNG images, where matplotlib is installed (`pip install atp[plots]`)."""

import io
from collections.abc import Callable, Sequence
from typing import Any

from atp.report.summary import Cell
from atp.strategies import DENSE, method_of, timing_of

# Okabe and Ito's palette, which the colour-blind can tell apart; wine stands in for its yellow.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STYLES = {"one stage": "-", "prune-then-tune": "--", "tune-prune-recover": "-.", "tune-then-prune": ":"}
"""Colour and marker tell the method, the line tells the timing."""

_DENSE_COLOUR = "#555555"
_LOG_FROM = 4.0
"""Above this ratio of the largest to the smallest perplexity the axis is logarithmic."""


class PlotsUnavailableError(ImportError):
    """matplotlib is not installed; the message says how to get it."""


def sparsity_plot(cells: Sequence[Cell]) -> bytes:
    """Perplexity against asked sparsity, a line per strategy with standard deviations, dense as a horizontal line.

    Raises:
        PlotsUnavailableError: without matplotlib.
    """
    figure, axes = _figure()
    _lines(axes, cells, lambda cell: (cell.sparsity or 0.0) * 100)
    for dense in _dense(cells):
        axes.axhline(dense.perplexity.mean, color=_DENSE_COLOUR, linestyle="--", linewidth=1.2, label=DENSE)
    axes.set_xlabel("prunable parameters removed (%)")
    axes.set_xticks(sorted({cell.sparsity * 100 for cell in cells if cell.sparsity is not None}))
    return _png(figure, axes, cells)


def size_plot(cells: Sequence[Cell]) -> bytes:
    """Perplexity against all parameters of the model, dense as a point.

    Raises:
        PlotsUnavailableError: without matplotlib.
    """
    figure, axes = _figure()
    size, unit = _unit(max(cell.parameters for cell in cells))
    _lines(axes, cells, lambda cell: cell.parameters / size)
    for dense in _dense(cells):
        x, y = dense.parameters / size, dense.perplexity
        axes.errorbar(x, y.mean, y.std or 0.0, fmt="*", color=_DENSE_COLOUR, markersize=12, capsize=3, label=DENSE)
    axes.set_xlabel(f"parameters of the model{unit}")
    return _png(figure, axes, cells)


def _figure() -> tuple[Any, Any]:
    """A figure without pyplot: no display, no global state."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise PlotsUnavailableError("matplotlib is not installed: pip install 'atp[plots]' draws the plots") from None
    figure = Figure(figsize=(9.0, 4.8), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _lines(axes: Any, cells: Sequence[Cell], x: Callable[[Cell], float]) -> None:
    strategies = sorted({cell.strategy for cell in cells if cell.strategy != DENSE}, key=lambda s: (s != "atp", s))
    methods = list(dict.fromkeys(method_of(strategy) for strategy in strategies))
    for strategy in strategies:
        index = methods.index(method_of(strategy))
        points = sorted((cell for cell in cells if cell.strategy == strategy), key=x)
        axes.errorbar(
            [x(cell) for cell in points],
            [cell.perplexity.mean for cell in points],
            [cell.perplexity.std or 0.0 for cell in points],
            label=strategy,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_STYLES[timing_of(strategy)],
            linewidth=2.4 if strategy == "atp" else 1.4,
            markersize=5,
            capsize=3,
            elinewidth=1.0,
        )


def _png(figure: Any, axes: Any, cells: Sequence[Cell]) -> bytes:
    means = [cell.perplexity.mean for cell in cells]
    axes.set_ylabel("held-out perplexity")
    if max(means) / min(means) > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylabel("held-out perplexity (log scale)")
        for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            ticks(_plain_number)
    axes.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3.5)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _plain_number(value: float, _: object) -> str:
    """20 where matplotlib would write 2 x 10^1; only at 1, 2, 3, 5 of each power of ten, so that they do not touch."""
    return f"{value:,.4g}" if f"{value:e}"[0] in "1235" else ""


def _dense(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.strategy == DENSE]


def _unit(largest: float) -> tuple[float, str]:
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= size:
            return size, f" ({name})"
    return 1.0, ""
