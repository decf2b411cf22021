"""A page -> one HTML document that needs nothing else: no network, no other file."""

from functools import cache
from itertools import count

import jinja2

from atp.report.page.drawing import ChartsUnavailableError, svg
from atp.report.page.parts import Chart, Page, Section

Drawn = list[tuple[Section, list[tuple[Chart, str | None]]]]


def render(page: Page) -> str:
    """The document. Whatever runs, models and users wrote is escaped; only our own SVG is not."""
    sections, missing = _drawn(page)
    return _environment().get_template("page.html.j2").render(page=page, sections=sections, missing=missing)


def _drawn(page: Page) -> tuple[Drawn, str]:
    """Sections with the SVG of their charts; where none can be drawn, `None` for each, and what to do about it."""
    numbers = count(1)
    try:
        return [(s, [(chart, svg(chart, f"f{next(numbers)}")) for chart in s.charts]) for s in page.sections], ""
    except ChartsUnavailableError as error:
        return [(s, [(chart, None) for chart in s.charts]) for s in page.sections], str(error)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("atp.report.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
