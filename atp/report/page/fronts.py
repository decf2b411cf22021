"""Quality against size and against latency: a point a run, and the Pareto front, the runs that none beats in both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atp.report.page.drawing import SHAPES, beside_colours, colours
from atp.report.page.parts import Chart, plain_table
from atp.report.page.texts import short
from atp.report.page.variants import Variant
from atp.report.values import finite, lower_is_better

_LOG_FROM = 4.0
"""Above this ratio of the largest to the smallest perplexity the axis is logarithmic."""
_TASKS = 4

_COSTS: tuple[tuple[str, str, Callable[[Variant], float | None]], ...] = (
    ("parameters", "~s", lambda variant: variant.parameters),
    ("prompt latency, ms", ",~r", lambda variant: variant.cost("prefill", "latency_ms")),
    ("decode latency, ms per token", ",~r", lambda variant: variant.cost("decode", "latency_ms_per_token")),
)


@dataclass(frozen=True)
class Point:
    """A run on a chart; a smaller `cost` is better."""

    name: str
    strategy: str
    cost: float
    quality: float
    spread: float = 0.0


@dataclass(frozen=True)
class _Axes:
    """What is drawn against what. `lower`: a smaller quality is better. `form`: d3's, of the cost."""

    quality: str
    lower: bool
    cost: str
    form: str

    def is_log(self, points: Sequence[Point]) -> bool:
        """Whether the axis of the quality is logarithmic."""
        numbers = [point.quality for point in points]
        return self.lower and min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_FROM


def front_charts(variants: Sequence[Variant], baseline: Variant) -> list[Chart]:
    """Perplexity, then the first tasks, each against parameters and latencies, where two runs have both."""
    qualities: list[tuple[str, bool, Callable[[Variant], tuple[float | None, float | None]]]] = [
        ("perplexity", True, lambda variant: (variant.perplexity, variant.perplexity_std))
    ]
    tasks = dict.fromkeys((s.task, s.metric) for variant in variants for s in variant.scores.values())
    qualities += [
        (f"{task}, {metric}", lower_is_better(metric), _score_of(task, metric)) for task, metric in list(tasks)[:_TASKS]
    ]
    charts = []
    for quality, lower, of in qualities:
        for cost, form, cost_of in _COSTS:
            points = [p for variant in variants if (p := _point(variant, cost_of(variant), *of(variant)))]
            if len({p.cost for p in points}) > 1 and len({p.quality for p in points}) > 1:
                charts.append(_chart(points, _Axes(quality, lower, cost, form), baseline.name))
    return charts


def pareto(points: Sequence[Point], lower: bool) -> list[Point]:
    """The points that no other equals or beats in both cost and quality and beats in one, by cost."""
    sign = 1.0 if lower else -1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, sign * p.quality)):
        if not front or sign * point.quality < sign * front[-1].quality:
            front.append(point)
    return front


def _score_of(task: str, metric: str) -> Callable[[Variant], tuple[float | None, float | None]]:
    def score(variant: Variant) -> tuple[float | None, float | None]:
        found = variant.scores.get(task)
        return (found.value if found and found.metric == metric else None), None

    return score


def _point(variant: Variant, cost: float | None, quality: float | None, spread: float | None) -> Point | None:
    if finite(cost) is None or finite(quality) is None:
        return None
    return Point(variant.name, variant.strategy, float(cost or 0), float(quality or 0), spread or 0.0)


def _chart(points: list[Point], axes: _Axes, baseline: str) -> Chart:
    front = pareto(points, axes.lower)
    title = f"{axes.quality} against {axes.cost}"
    best = "lower left is better" if axes.lower else "upper left is better"
    strategies = dict.fromkeys(point.strategy for point in points)
    rows = [[p.name, short(p.cost), short(p.quality), "yes" if p in front else ""] for p in points]
    return Chart(
        title,
        f"Scatter plot of {title}; {best}. On the Pareto front: {', '.join(p.name for p in front)}.",
        lambda alt: _drawn(alt, points, front, axes, baseline),
        plain_table(title, ("run", axes.cost, axes.quality, "on the front"), rows),
        f"{best[0].upper()}{best[1:]}. The grey line is the Pareto front; the ring is the baseline.",
        height=220 + 20 * len(strategies),
    )


def _drawn(alt: Any, points: list[Point], front: list[Point], axes: _Axes, baseline: str) -> Any:
    strategies = list(dict.fromkeys(point.strategy for point in points))
    log = axes.is_log(points)
    lowest = min(point.quality for point in points) if log else None
    values = [_values(point, axes, baseline, lowest) for point in points]
    y = alt.Y(
        "quality:Q",
        title=f"{axes.quality} (log scale)" if log else axes.quality,
        scale=alt.Scale(zero=False, nice=not log, padding=12, type="log" if log else "linear"),
        axis=alt.Axis(tickCount=5, format=",~r"),
    )
    x = alt.X(
        "cost:Q",
        title=axes.cost,
        scale=alt.Scale(zero=False, nice=True, padding=16),
        axis=alt.Axis(tickCount=4, format=axes.form, grid=False),
    )
    colour = alt.Scale(domain=strategies, range=colours(len(strategies)))
    shape = alt.Scale(domain=strategies, range=beside_colours(SHAPES, len(strategies)))
    legend = alt.Legend(title=None, orient="bottom", columns=1) if len(strategies) > 1 else None
    base = alt.Chart(alt.Data(values=values)).encode(x=x, y=y)
    line = (
        alt.Chart(alt.Data(values=[{"cost": point.cost, "quality": point.quality} for point in front]))
        .mark_line(interpolate="step-after", color="var(--rule)", strokeWidth=1.5, aria=False)
        .encode(x="cost:Q", y="quality:Q")
    )
    bars = (
        base.transform_filter("datum.low < datum.high")
        .mark_rule(aria=False, opacity=0.7)
        .encode(y="low:Q", y2="high:Q")
    )
    ring = base.transform_filter("datum.baseline").mark_point(size=260, color="var(--fg)", strokeWidth=1.5, aria=False)
    dots = base.mark_point(filled=True, size=80, opacity=1).encode(
        color=alt.Color("strategy:N", scale=colour, legend=legend),
        shape=alt.Shape("strategy:N", scale=shape, legend=legend),
        description="tip:N",
    )
    return alt.layer(line, bars, ring, dots)


def _values(point: Point, axes: _Axes, baseline: str, lowest: float | None) -> dict[str, Any]:
    """What is drawn of a point; `lowest`: where a bar ends that would leave a logarithmic axis."""
    low = point.quality - point.spread
    return {
        "strategy": point.strategy,
        "cost": point.cost,
        "quality": point.quality,
        "low": lowest if lowest is not None and low <= 0 else low,
        "high": point.quality + point.spread,
        "baseline": point.name == baseline,
        "tip": f"{point.name}: {axes.quality} {short(point.quality)}, {axes.cost} {short(point.cost)}",
    }
