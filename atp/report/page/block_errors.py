"""Errors of blocks that were fitted to a teacher's: read, and drawn before and after, on two texts.

Blocks are fitted on calibration text. By how much their error is higher on text that they were not fitted on, the gap,
shows what they learned by heart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp.report.page.parts import Chart, Table, plain_table
from atp.report.page.texts import NOTHING, short
from atp.report.values import at, finite, flag, number_at

CALIBRATION, HELD_OUT = "calibration", "held_out"
TEXTS = {CALIBRATION: "calibration text", HELD_OUT: "held-out text", "other": "other text"}
TIMES = ("before", "after")

_COLOURS = {"before": "var(--c2)", "after": "var(--c1)"}
_DASHES = {CALIBRATION: [4, 3], HELD_OUT: [1, 0]}
_BLOCKS, _NAMED, _HIGHEST = 400, 12, 1e6
"""How many are shown at most, so that no file makes a page too large."""
_LOG_FROM = 4.0
"""Above this ratio of the largest to the smallest error the axis is logarithmic."""


@dataclass(frozen=True)
class Block:
    """One block. `errors`: relative ones, by text and time, those that are known. `kept`: `None` where nothing says."""

    number: int
    errors: Mapping[tuple[str, str], float]
    kept: bool | None
    seconds: float | None

    def gap(self, time: str) -> float | None:
        """By what share of it the error on held-out text is above that on calibration text."""
        low, high = (self.errors.get((text, time)) for text in (CALIBRATION, HELD_OUT))
        return None if low is None or high is None or low <= 0 else finite(high / low - 1)


def read_blocks(recovery: Mapping[str, Any]) -> list[Block]:
    """Those of which something is known, by number."""
    given = at(recovery, "blocks")
    found: dict[int, Block] = {}
    for place, each in enumerate(given[:_BLOCKS] if isinstance(given, list) else []):
        errors = {
            (text, time): value
            for text in TEXTS
            for time in TIMES
            if (value := finite(at(each, time, text, "relative"))) is not None
        }
        block = finite(at(each, "block"))
        number = int(block) if block is not None and 0 <= block < _HIGHEST else place
        kept = flag(at(each, "kept"))
        if errors or kept is not None:
            found[number] = Block(number, errors, kept, number_at(each, "seconds"))
    return [found[number] for number in sorted(found)]


def error_charts(blocks: Sequence[Block]) -> tuple[Chart, ...]:
    """The errors, and the gap between the two texts, as far as they are known."""
    return tuple(chart for chart in (_errors(blocks), _gaps(blocks)) if chart)


def _errors(blocks: Sequence[Block]) -> Chart | None:
    """Lines of the errors on both texts, before and after, the gap between the two shaded."""
    points = {
        (text, time): known
        for time in TIMES
        for text in (CALIBRATION, HELD_OUT)
        if (known := [(block.number, block.errors[text, time]) for block in blocks if (text, time) in block.errors])
    }
    if not points:
        return None
    bands = {
        time: [
            {"block": block.number, "low": block.errors[CALIBRATION, time], "high": block.errors[HELD_OUT, time]}
            for block in blocks
            if block.gap(time) is not None
        ]
        for time in TIMES
    }
    undone = [str(block.number) for block in blocks if block.kept is False]
    notes = ["Shaded: the gap between calibration and held-out text."] if any(bands.values()) else []
    if undone:
        notes.append(f"Blocks rolled back: {', '.join(undone[:_NAMED])}{', ...' if len(undone) > _NAMED else '.'}")
    return Chart(
        "Relative error per block",
        f"Lines of each block's error relative to the teacher's output, in {len(blocks)} blocks. "
        + "; ".join(f"{_name(*key)}: {_percent(_mean(known))} on average" for key, known in points.items())
        + ".",
        lambda alt: _drawn(alt, "relative error", points, bands),
        _numbers(blocks),
        " ".join(notes),
        height=270,
    )


def _gaps(blocks: Sequence[Block]) -> Chart | None:
    """The gap itself, as a share: errors differ more from block to block than from text to text."""
    points = {
        (HELD_OUT, time): known
        for time in TIMES
        if (known := [(block.number, gap) for block in blocks if (gap := block.gap(time)) is not None])
    }
    if not points:
        return None
    return Chart(
        "Gap: held-out over calibration error",
        "Lines of how much higher each block's error is on held-out text, in shares of that on calibration text. "
        + "; ".join(f"{time}: {_percent(_mean(known))} on average" for (_, time), known in points.items())
        + ".",
        lambda alt: _drawn(alt, "share of the calibration error", points),
        height=250,
    )


def _drawn(
    alt: Any,
    title: str,
    points: Mapping[tuple[str, str], Sequence[tuple[int, float]]],
    bands: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Any:
    """A line for each text and time; `bands` are shaded, by time, where the lines are errors and not their gaps."""
    names = {key: key[1] if bands is None else _name(*key) for key in points}
    values = [
        {"block": block, "value": value, "series": names[key], "tip": f"block {block}, {names[key]}: {_percent(value)}"}
        for key, known in points.items()
        for block, value in known
    ]
    numbers = [value for known in points.values() for _, value in known]
    log = bands is not None and min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_FROM
    x = alt.X(
        "block:Q",
        scale=alt.Scale(zero=False, nice=False, padding=6),
        axis=alt.Axis(title="block", format="d", tickMinStep=1, tickCount=6, grid=False),
    )
    scale = alt.Scale(type="log" if log else "linear", zero=not log, nice=not log, padding=6)
    title = f"{title} (log scale)" if log else title
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(format="~%", tickCount=5))
    legend = alt.Legend(title=None, orient="bottom", columns=2, symbolType="stroke", symbolSize=300)
    colours = alt.Scale(domain=list(names.values()), range=[_COLOURS[time] for _, time in names])
    dashes = alt.Scale(domain=list(names.values()), range=[_DASHES[text] for text, _ in names])
    base = alt.Chart(alt.Data(values=values)).encode(
        x=x, y=y, color=alt.Color("series:N", scale=colours, legend=legend)
    )
    line = base.mark_line(strokeWidth=2, aria=False).encode(
        strokeDash=alt.StrokeDash("series:N", scale=dashes, legend=legend)
    )
    dots = base.mark_circle(size=30 if len(values) <= 160 else 12, opacity=1).encode(description="tip:N")
    shades = [
        alt.Chart(alt.Data(values=band))
        .mark_area(color=_COLOURS[time], opacity=0.2, aria=False)
        .encode(x=x, y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q")
        for time, band in (bands or {}).items()
        if band
    ]
    return alt.layer(*shades, line, dots)


def _numbers(blocks: Sequence[Block]) -> Table:
    """A row a block, with a column for each text and time that any block has."""
    keys = [(text, time) for text in TEXTS for time in TIMES if any((text, time) in block.errors for block in blocks)]
    rows = [
        [
            str(block.number),
            *(_percent(block.errors.get(key)) for key in keys),
            NOTHING if block.kept is None else "yes" if block.kept else "no",
            short(block.seconds),
        ]
        for block in blocks
    ]
    return plain_table("Relative error per block", ("block", *(_name(*key) for key in keys), "kept", "s"), rows)


def _name(text: str, time: str) -> str:
    return f"{TEXTS[text].removesuffix(' text')}, {time}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{short(value * 100, 3)} %"


def _mean(known: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in known) / len(known)
