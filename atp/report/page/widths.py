"""Kept widths: a heat map of blocks over steps for every kind of group, and what is left of each block at the end.

A stretch of steps in which a block does not change is one rectangle, and long histories are thinned, so that 80 blocks
over 10,000 logged steps stay small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atp.report.journal import Journal
from atp.report.page.lines import evenly
from atp.report.page.parts import Chart, Section, plain_table
from atp.report.page.training import decision_charts, frozen_at, kind_title
from atp.report.values import finite, mapping_at

_CELLS = 7_000
"""Rectangles of all heat maps together, at most."""
_COLUMNS = 60
_ROW, _LOWEST, _TALLEST, _AROUND = 11, 36, 330, 132
"""Pixels of a block, of all blocks, and of the axis and the legend around them."""
_COLOURS = "viridis"
_LABELLED = 12


@dataclass(frozen=True)
class _Kind:
    """One kind of group. `names`: of its sets, by block. `history`: at each step, the share kept of each set."""

    kind: str
    names: list[str]
    sizes: list[int]
    history: list[tuple[int, list[float]]]


def widths_section(journal: Journal) -> Section:
    """Heat maps and bars of what was kept; empty where no decision was ever logged."""
    kinds = [found for kind in mapping_at(journal.run, "sizes") if (found := _kind(journal, kind))]
    rows = sum(len(each.names) for each in kinds)
    columns = max(min(_COLUMNS, _CELLS // max(rows, 1)), 2)
    end = max((step for each in kinds for step, _ in each.history), default=0)
    maps = [_heat_map(each, columns, frozen_at(journal), end) for each in kinds]
    bars = [_bars(each) for each in kinds if len(each.names) > 1 and max(each.sizes) > 1]
    kept, churn = decision_charts(journal)
    return Section(
        "widths",
        "What was kept, block by block",
        "The share of its groups that each block keeps: over training, then at the last logged step. "
        "Where nothing is left the colour is orange.",
        charts=tuple(chart for chart in (*maps, kept, *bars, churn) if chart),
    )


def _kind(journal: Journal, kind: str) -> _Kind | None:
    given = mapping_at(journal.run, "sizes").get(kind)
    sizes = [int(finite(size) or 0) for size in given] if isinstance(given, list) else []
    history = []
    for step, kept in journal.kept:
        counts = kept.get(kind)
        if isinstance(counts, list) and len(counts) == len(sizes):
            history.append((step, [_share(finite(c), size) for c, size in zip(counts, sizes, strict=True)]))
    return _Kind(kind, _names(journal, kind, len(sizes)), sizes, history) if sizes and history else None


def _share(count: float | None, size: int) -> float:
    return min(max((count or 0.0) / size, 0.0), 1.0) if size else 0.0


def _names(journal: Journal, kind: str, sets: int) -> list[str]:
    """The block of each set, `all` for one of the whole model; a second set of a block gets a letter."""
    blocks = mapping_at(journal.run, "blocks").get(kind)
    known = blocks if isinstance(blocks, list) and len(blocks) == sets else list(range(sets))
    names = ["all" if block is None else str(block) for block in known]
    return [
        name if names.count(name) == 1 else f"{name}{chr(97 + names[:i].count(name))}" for i, name in enumerate(names)
    ]


def _heat_map(kind: _Kind, columns: int, freeze: int | None, end: int) -> Chart:
    stretches = _stretches(kind, columns, end)
    first, last = kind.history[0], kind.history[-1]
    return Chart(
        f"{_capital(kind_title(kind.kind))} kept over training",
        f"Heat map of {kind_title(kind.kind)}: block by block, the share kept at each logged step. On average "
        f"{_mean(first[1]):.0%} at step {first[0]}, {_mean(last[1]):.0%} at step {last[0]}, where the least of a block "
        f"is {min(last[1]):.0%} and the most {max(last[1]):.0%}.",
        lambda alt: _drawn_map(alt, kind, stretches, freeze),
        height=min(max(len(kind.names) * _ROW, _LOWEST), _TALLEST) + _AROUND,
    )


def _stretches(kind: _Kind, columns: int, end: int) -> list[dict[str, Any]]:
    """Rectangles: a set, the steps from and to which it keeps the same, and how much."""
    history = evenly(kind.history, columns)
    steps = [step for step, _ in history]
    ends = [*steps[1:], max(end, steps[-1] + max(steps[-1] - steps[-2], 1) if len(steps) > 1 else steps[-1] + 1)]
    found: list[dict[str, Any]] = []
    for row, (name, size) in enumerate(zip(kind.names, kind.sizes, strict=True)):
        start = 0
        for i in range(1, len(history) + 1):
            if i == len(history) or history[i][1][row] != history[start][1][row]:
                share = history[start][1][row]
                tip = f"block {name}, steps {steps[start]:,}-{ends[i - 1]:,}: {round(share * size):,} of {size:,}"
                found.append({"b": name, "from": steps[start], "to": ends[i - 1], "kept": round(share, 4), "tip": tip})
                start = i
    return found


def _drawn_map(alt: Any, kind: _Kind, stretches: list[dict[str, Any]], freeze: int | None) -> Any:
    labels = _some(kind.names)
    base = (
        alt.Chart(alt.Data(values=stretches))
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X(
                "from:Q",
                title="optimizer step",
                scale=alt.Scale(nice=False, zero=False),
                axis=alt.Axis(tickCount=5, format="~s", grid=False),
            ),
            x2="to:Q",
            y=alt.Y(
                "b:O",
                title="block",
                sort=kind.names,
                scale=alt.Scale(paddingInner=0),
                axis=alt.Axis(values=labels, ticks=False, labelPadding=4),
            ),
            color=alt.Color(
                "kept:Q",
                scale=alt.Scale(scheme=_COLOURS, domain=[0, 1]),
                legend=alt.Legend(
                    title="share kept",
                    orient="bottom",
                    format=".0%",
                    values=[0, 0.25, 0.5, 0.75, 1],
                    gradientLength=220,
                    gradientThickness=10,
                ),
            ),
            description="tip:N",
        )
    )
    none_left = [each for each in stretches if each["kept"] <= 0]
    layers = [base]
    if none_left:
        empty = alt.Chart(alt.Data(values=none_left)).mark_rect(fill="var(--empty)", strokeWidth=0)
        layers.append(empty.encode(x="from:Q", x2="to:Q", y=alt.Y("b:O", sort=kind.names), description="tip:N"))
    if freeze is not None and stretches[0]["from"] < freeze < max(each["to"] for each in stretches):
        # white on black, which stands out from every colour of the map
        rule = alt.Chart(alt.Data(values=[{"from": freeze}])).encode(x="from:Q")
        layers.append(rule.mark_rule(aria=False, color="black", strokeWidth=2))
        layers.append(rule.mark_rule(aria=False, color="white", strokeWidth=2, strokeDash=[4, 4]))
    return alt.layer(*layers)


def _bars(kind: _Kind) -> Chart:
    step, shares = kind.history[-1]
    rows, counts = [], []
    for name, share, size in zip(kind.names, shares, kind.sizes, strict=True):
        kept = round(share * size)
        tip = f"block {name}: {kept:,} of {size:,} kept"
        rows.append({"b": name, "kept": round(share, 4), "size": 1.0, "tip": tip})
        counts.append([name, f"{kept:,}", f"{size:,}", f"{share:.0%}"])
    least = min(range(len(shares)), key=shares.__getitem__)
    return Chart(
        f"{_capital(kind_title(kind.kind))} left per block",
        f"Bars of the share of {kind_title(kind.kind)} kept in each of {len(rows)} blocks at step {step}: least in "
        f"block {kind.names[least]} with {shares[least]:.0%}, on average {_mean(shares):.0%}.",
        lambda alt: _drawn_bars(alt, kind.names, rows),
        plain_table(f"{kind_title(kind.kind)} at step {step:,}", ("block", "kept", "of", "share"), counts),
    )


def _drawn_bars(alt: Any, names: list[str], rows: list[dict[str, Any]]) -> Any:
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("b:O", title="block", sort=names, axis=alt.Axis(values=_some(names), labelAngle=0, ticks=False))
    )
    scale = alt.Scale(domain=[0, 1])
    whole = base.mark_bar(color="var(--grid)", aria=False).encode(y=alt.Y("size:Q", scale=scale))
    kept = base.mark_bar(color="var(--c1)").encode(
        y=alt.Y("kept:Q", title="share kept", scale=scale, axis=alt.Axis(format=".0%", tickCount=5)),
        description="tip:N",
    )
    return alt.layer(whole, kept)


def _some(names: Sequence[str]) -> list[str]:
    """Names far enough apart for an axis."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, len(names)) if len(names) / n <= _LABELLED or n == len(names))
    return list(names[::every])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
