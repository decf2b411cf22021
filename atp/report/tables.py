"""Cells -> the rows of the table that `atp compare` prints: short enough for 100 columns."""

from collections.abc import Sequence

from atp.report.summary import Cell, Spread


def printed_table(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column titles, and a row a cell.

    `decode`: time per token; `memory`: peak of training; `scores`: on tasks, in the place of the seconds of training
    where there are any; `rate`: the best learning rate, in the place of memory where there are several.
    """
    tried = any(len(cell.by_rate) > 1 for cell in cells)
    scored = any(cell.scores for cell in cells)
    columns = (
        *("strategy", "seeds", "perplexity", "gap\nclosed", "nll /\ndense"),
        *("params", "decode\n/ dense", "rate" if tried else "memory\n/ dense"),
        "scores\n/ dense" if scored else "train\ns",
    )
    rows: list[tuple[str, ...]] = [
        (
            cell.strategy,
            str(cell.seeds),
            spread(cell.perplexity),
            percent(cell.gap_closed),
            number(cell.relative_nll),
            count(cell.parameters),
            times(cell.decode_to_dense),
            cell.learning_rate if tried else times(cell.memory_to_dense),
            percent(cell.relative_performance) if scored else f"{cell.train_seconds:,.0f}",
        )
        for cell in cells
    ]
    return columns, rows


def spread(value: Spread, digits: int = 2) -> str:
    """`30.64 ± 0.13`, without digits from 1,000 on."""
    digits = digits if value.mean < 1000 else 0
    mean = f"{value.mean:,.{digits}f}" if value.mean < 1e7 else f"{value.mean:.2e}"
    return mean if value.std is None else f"{mean} ± {value.std:{f'.{digits}f' if value.std < 1e7 else '.1e'}}"


def percent(share: float | None) -> str:
    """`52 %`."""
    return "" if share is None else f"{share * 100:,.0f} %"


def number(value: float | None) -> str:
    """Three decimals."""
    return "" if value is None else f"{value:.3f}"


def times(ratio: float | None) -> str:
    """`0.71x`."""
    return "" if ratio is None else f"{ratio:.2f}x"


def count(value: float) -> str:
    """`134.5M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"
