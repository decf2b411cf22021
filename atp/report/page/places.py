"""Where parameters and time go, part by part of the model, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

from atp.report.page.drawing import SERIES
from atp.report.page.parts import Chart, Section, plain_table
from atp.report.page.texts import short
from atp.report.values import finite, mapping_at

PARTS = ("embedding", "attention", "mlp", "norms", "head")
_MEASURES = (
    ("parameters", "Parameters by part", "parameters", "~s"),
    ("ms", "Time of one prompt by part", "milliseconds", ",~r"),
)


def places_section(models: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    """Stacked bars, one a model, of what its `parts` say.

    Args:
        models: by name, costs as `metrics.json` holds them.
    """
    charts = [_chart(models, *measure) for measure in _MEASURES]
    return Section("places", "Where parameters and time go", charts=tuple(chart for chart in charts if chart))


def _chart(models: Sequence[tuple[str, Mapping[str, Any]]], key: str, title: str, unit: str, form: str) -> Chart | None:
    known = {
        (name, part): value
        for name, cost in models
        for part in PARTS
        if (value := finite(mapping_at(cost, "parts", part).get(key))) is not None
    }
    if not any(known.values()):
        return None
    names = list(dict.fromkeys(name for name, _ in known))
    parts = [part for part in PARTS if any(known.get((name, part)) for name in names)]
    totals = {name: sum(known.get((name, part), 0.0) for part in parts) for name in names}
    values = [
        {
            "model": name,
            "part": part,
            "order": PARTS.index(part),
            "value": value,
            "tip": f"{name}, {part}: {short(value)} {unit} of {short(totals[name])}",
        }
        for (name, part), value in known.items()
        if part in parts
    ]
    rows = [[part, *(short(known.get((name, part))) for name in names)] for part in parts]
    rows.append(["all", *(short(total) for total in totals.values())])
    words = [f"{name}: {', '.join(f'{part} {short(known.get((name, part)))}' for part in parts)}" for name in names]
    return Chart(
        title,
        f"Stacked bars of {unit} by part of the model. {'; '.join(words)}.",
        lambda alt: _drawn(alt, names, parts, values, unit, form),
        plain_table(title, (unit, *names), rows),
        height=len(names) * 44 + 110,
    )


def _drawn(alt: Any, names: list[str], parts: list[str], values: list[dict[str, Any]], unit: str, form: str) -> Any:
    colours = [SERIES[PARTS.index(part)] for part in parts]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar(stroke="var(--card)", strokeWidth=1)
        .encode(
            x=alt.X("value:Q", title=unit, axis=alt.Axis(format=form, tickCount=5)),
            y=alt.Y("model:N", title=None, sort=names, scale=alt.Scale(padding=0.2)),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=parts, range=colours),
                legend=alt.Legend(title=None, orient="bottom", columns=3),
            ),
            order="order:Q",
            description="tip:N",
        )
    )
