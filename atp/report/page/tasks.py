"""Scores on tasks, with their 95 % intervals: read, and drawn as dots with bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atp.report.page.drawing import SHAPES, beside_colours, colours
from atp.report.page.parts import Chart, Section, plain_table
from atp.report.page.texts import short
from atp.report.values import at, finite, mapping_at, number_at, text_at

_ROW = 20


@dataclass(frozen=True)
class Score:
    """One model on one task. `low` and `high`: of the 95 % interval, `None` where it is not known."""

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    rows: float | None

    @property
    def interval(self) -> str:
        """`[0.508, 0.596]`."""
        return "" if self.low is None or self.high is None else f"[{short(self.low, 3)}, {short(self.high, 3)}]"

    @property
    def text(self) -> str:
        """`0.552 [0.508, 0.596]`."""
        return f"{short(self.value, 3)} {self.interval}".rstrip()


def scores(measured: Any) -> dict[str, Score]:
    """By task, the primary metric of what `tasks` holds; the interval of the metric, else of its standard error."""
    return {task: _score(task, found) for task, found in mapping_at(measured, "tasks").items()}


def _score(task: str, found: Any) -> Score:
    metric = text_at(found, "metric") or "score"
    value, stderr = number_at(found, "value"), finite(at(found, "stderr"))
    low, high = (finite(at(found, "metrics", metric, end)) for end in ("low", "high"))
    if (low is None or high is None) and value is not None and stderr is not None:
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
    return Score(task, metric, value, low, high, number_at(found, "rows"))


def tasks_section(models: Sequence[tuple[str, dict[str, Score]]]) -> Section:
    """One chart per metric, with all tasks and models on it.

    Args:
        models: by name, those that have scores.
    """
    shown = [(name, found) for name, found in models if any(finite(s.value) is not None for s in found.values())]
    metrics = dict.fromkeys(score.metric for _, found in shown for score in found.values())
    charts = [_chart(metric, shown) for metric in metrics]
    return Section(
        "tasks",
        "Scores on tasks",
        "Dots are scores, bars their 95 % intervals." if charts else "",
        charts=tuple(charts),
        items=tuple(_cut(models)),
    )


def _cut(models: Sequence[tuple[str, dict[str, Score]]]) -> list[str]:
    bad = [
        f"{n}: {s.task} has no finite score" for n, found in models for s in found.values() if finite(s.value) is None
    ]
    return bad[:20]


def _chart(metric: str, models: Sequence[tuple[str, dict[str, Score]]]) -> Chart:
    found = [(name, s) for name, all_of in models for s in all_of.values() if s.metric == metric]
    found = [(name, s) for name, s in found if finite(s.value) is not None]
    tasks, names = list(dict.fromkeys(s.task for _, s in found)), list(dict.fromkeys(name for name, _ in found))
    values = [
        {
            "task": s.task,
            "model": name,
            "value": s.value,
            "low": s.value if s.low is None else s.low,
            "high": s.value if s.high is None else s.high,
            "tip": f"{name} on {s.task}: {metric} {s.text}",
        }
        for name, s in found
    ]
    rows = [[s.task, name, s.text, "" if s.rows is None else f"{s.rows:,.0f}"] for name, s in found]
    return Chart(
        metric,
        f"Dots with 95 % intervals of {metric}. "
        + "; ".join(f"{name} on {s.task}: {s.text}" for name, s in found[:8])
        + ".",
        lambda alt: _drawn(alt, metric, tasks, names, values),
        plain_table(metric, ("task", "model", f"{metric} [95 % interval]", "rows"), rows),
        height=max(len(tasks) * (len(names) * _ROW + 10), 60) + 60 + 22 * -(-len(names) // 2),
    )


def _drawn(alt: Any, metric: str, tasks: list[str], names: list[str], values: list[dict[str, Any]]) -> Any:
    scale = alt.Scale(domain=names, range=colours(len(names)))
    shapes = alt.Scale(domain=names, range=beside_colours(SHAPES, len(names)))
    legend = alt.Legend(title=None, orient="bottom", columns=2 if max(map(len, names)) < 20 else 1)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("task:N", title=None, sort=tasks, scale=alt.Scale(paddingInner=0.25, paddingOuter=0.1)),
        yOffset=alt.YOffset("model:N", sort=names, scale=alt.Scale(domain=names)),
        color=alt.Color("model:N", scale=scale, legend=legend),
    )
    x = alt.Scale(zero=False, nice=True, padding=8)
    bars = base.mark_rule(strokeWidth=2, aria=False).encode(x=alt.X("low:Q", scale=x), x2="high:Q")
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("value:Q", title=metric, axis=alt.Axis(tickCount=5)),
        shape=alt.Shape("model:N", scale=shapes, legend=legend),
        description="tip:N",
    )
    return alt.layer(bars, dots)
