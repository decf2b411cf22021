"""Scalars over training: one chart of one or more series, with the step at which the decision froze."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp.report.journal import Series
from atp.report.page.drawing import DASHES, beside_colours, colours
from atp.report.page.parts import Chart, plain_table
from atp.report.page.texts import short

_DRAWN = 240
"""Points of a line at most."""
_TABLED = 24
_SYMBOL = 400
"""Square pixels of a line in the legend: 20 long, so that its dashes show."""
_LONG = 20
"""Characters from which on two names do not fit side by side in a legend."""


@dataclass(frozen=True)
class Lines:
    """What one chart shows. `format`: d3's, of the y axis. `freeze`: the step to mark. `zero`: y begins at 0."""

    title: str
    y: str
    series: Mapping[str, Series]
    format: str = ",~r"
    freeze: int | None = None
    zero: bool = False
    note: str = ""


def line_chart(lines: Lines) -> Chart | None:
    """A chart, or `None` where no series has a value."""
    series = {name: thinned(points, _DRAWN) for name, points in lines.series.items() if points}
    if not series:
        return None
    names = list(series)
    values = [
        {"step": step, "value": value, "series": name, "tip": f"{name}, step {step:,}: {short(value)}"}
        for name, points in series.items()
        for step, value in points
    ]
    return Chart(
        lines.title,
        " ".join(_in_words(name, lines.series[name]) for name in names),
        lambda alt: _drawn(alt, lines, names, values),
        plain_table(lines.title, ("step", *names), _rows(lines.series, names)),
        lines.note,
        height=230 + 20 * (-(-len(names) // _columns(names)) - 1),
    )


def thinned(points: Series, limit: int) -> Series:
    """At most `limit` points in the same order: the lowest and the highest of every stretch, and the last."""
    if len(points) <= limit:
        return points
    length = -(-len(points) // max((limit - 2) // 2, 1))
    found: Series = []
    for first in range(0, len(points), length):
        stretch = points[first : first + length]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return found if found[-1] == points[-1] else [*found, points[-1]]


def evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` items, as far apart as can be, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _in_words(name: str, points: Series) -> str:
    (first, start), (last, end) = points[0], points[-1]
    if len(points) == 1:
        return f"{name}: {start:.4g} at step {first}."
    return f"{name}: {start:.4g} at step {first}, {end:.4g} at step {last}."


def _rows(series: Mapping[str, Series], names: Sequence[str]) -> list[list[str]]:
    known = [dict(series[name]) for name in names]
    steps = evenly(sorted({step for each in known for step in each}), _TABLED)
    return [[f"{step:,}", *(short(each[step]) if step in each else "" for each in known)] for step in steps]


def _columns(names: Sequence[str]) -> int:
    """Of the legend."""
    return 2 if max(map(len, names)) < _LONG else 1


def _drawn(alt: Any, lines: Lines, names: list[str], values: list[dict[str, Any]]) -> Any:
    several = len(names) > 1
    legend = (
        alt.Legend(title=None, orient="bottom", columns=_columns(names), symbolType="stroke", symbolSize=_SYMBOL)
        if several
        else None
    )
    colour = alt.Color("series:N", scale=alt.Scale(domain=names, range=colours(len(names))), legend=legend)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(tickCount=5, format="~s", grid=False)),
        y=alt.Y(
            "value:Q",
            title=lines.y,
            scale=alt.Scale(zero=lines.zero, nice=True),
            axis=alt.Axis(format=lines.format, tickCount=5),
        ),
        color=colour,
    )
    line = base.mark_line(strokeWidth=2, aria=False, clip=True)
    if several:
        line = line.encode(
            strokeDash=alt.StrokeDash(
                "series:N", scale=alt.Scale(domain=names, range=beside_colours(DASHES, len(names)))
            )
        )
    few = len(values) <= 60 * len(names)
    dots = base.mark_circle(size=16 if few else 40, opacity=1 if few else 0).encode(description="tip:N")
    return alt.layer(*_freeze(alt, lines, values), line, dots)


def _freeze(alt: Any, lines: Lines, values: list[dict[str, Any]]) -> list[Any]:
    """A dashed rule where the decision froze, if that is inside what is shown."""
    steps = [value["step"] for value in values]
    if lines.freeze is None or not min(steps) < lines.freeze < max(steps):
        return []
    late = lines.freeze > (min(steps) + max(steps)) / 2
    base = alt.Chart(alt.Data(values=[{"step": lines.freeze}])).encode(x="step:Q")
    word = base.mark_text(align="right" if late else "left", dx=-4 if late else 4, dy=8, aria=False)
    return [
        base.mark_rule(strokeDash=[3, 3], aria=False, opacity=0.7),
        word.encode(text=alt.value("frozen"), y=alt.value(0)),
    ]
