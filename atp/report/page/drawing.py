"""Charts as static SVG, by Vega-Altair and vl-convert (`pip install 'atp[report]'`), without a network or a browser.

Colours are CSS variables, which Vega hands through and the page defines for light, dark and print; no script draws.
"""

import html
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from atp.report.page.parts import Chart

Form = TypeVar("Form")

WIDTH = 340
"""Pixels of a chart, so that its text is 12 pixels high on a telephone too."""

SERIES = tuple(f"var(--c{n})" for n in range(1, 9))
DASHES = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3], [4, 4], [12, 3], [1, 3], [6, 2, 1, 2])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")

_FONT = "Helvetica, Arial, sans-serif"
_QUIET = {"domainColor": "var(--rule)", "tickColor": "var(--rule)", "gridColor": "var(--grid)"}
_TEXT = {"labelColor": "var(--fg)", "titleColor": "var(--fg)", "labelFont": _FONT, "titleFont": _FONT}
_SIZES = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_CONFIG: dict[str, Any] = {
    "background": None,
    "font": _FONT,
    "view": {"stroke": None},
    "axis": _QUIET | _TEXT | _SIZES | {"labelLimit": 120, "titleLimit": 300},
    "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleY": -12, "titleX": -34},
    "legend": _TEXT | _SIZES | {"labelLimit": 290, "symbolStrokeWidth": 2, "titleLimit": 300},
    "text": {"color": "var(--fg)", "font": _FONT, "fontSize": 12},
    "rule": {"color": "var(--fg)"},
}


class ChartsUnavailableError(ImportError):
    """altair or vl-convert is not installed; the message is the command that installs them."""


def colours(count: int) -> list[str]:
    """One for each series; they come again after the last."""
    return [SERIES[i % len(SERIES)] for i in range(count)]


def beside_colours(forms: Sequence[Form], count: int) -> list[Form]:
    """A form for each series, such that one whose colour comes again has another form."""
    return [forms[(i + i // len(SERIES)) % len(forms)] for i in range(count)]


def svg(chart: Chart, prefix: str) -> str:
    """The chart as an SVG element that can stand in HTML.

    Args:
        prefix: goes in front of every id inside, which has to be the only one of its name on the page.

    Raises:
        ChartsUnavailableError: without altair or vl-convert.
    """
    try:
        import altair  # noqa: PLC0415
        import vl_convert  # noqa: PLC0415
    except ImportError:
        raise ChartsUnavailableError("pip install 'atp[report]'") from None
    drawn = chart.draw(altair).properties(width=WIDTH, **({"height": chart.height} if chart.height else {}))
    spec = drawn.to_dict(validate=False)
    spec["autosize"] = {"type": "fit" if chart.height else "fit-x", "contains": "padding"}
    spec["padding"] = {"left": 4, "right": 8, "top": 6, "bottom": 4}
    spec["config"] = _CONFIG
    return _inline(vl_convert.vegalite_to_svg(spec), chart.alt, prefix)


def _inline(drawn: str, alt: str, prefix: str) -> str:
    """Without a size of its own, with the words for those who do not see it, and ids that meet no other's."""
    drawn = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', drawn)
    drawn = re.sub(r'url\("?#([^)"]+)"?\)', rf"url(#{prefix}-\1)", drawn)
    drawn = re.sub(r' (?:aria-roledescription|role)="[^"]*"| xmlns(?::xlink)?="[^"]*"| aria-hidden="true"', "", drawn)
    size = re.search(r'viewBox="[^"]*"', drawn)
    head = f'<svg role="img" aria-label="{html.escape(alt)}" {size.group(0) if size else ""}>'
    return re.sub(r"<svg[^>]*>", lambda _: head, drawn, count=1)
