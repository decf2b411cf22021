"""Pages in a real browser: no complaint, no request, no sideways scroll, light, dark and printed."""

import json

import pytest

from atp.report import write_comparison, write_report
from atp.report.sources import read_sources
from tests.report import browser, folders
from tests.report.rows import ROWS

pytestmark = pytest.mark.skipif(browser.PATH is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page, and one of a comparison's rows with two runs beside them."""
    folder = tmp_path_factory.mktemp("pages")
    run = folders.run(folder / "run", recovered=folders.recovery())
    other = folders.run(folder / "other", False, folders.metrics(0.8, 20.0, 0.6, "ffff"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    records, failed = read_sources([run, other, folder / "rows.jsonl"])
    return [write_report(run).path, write_comparison(records, folder / "page.html", None, failed).path]


@pytest.fixture(scope="module")
def chromium():
    opened = browser.Browser()
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_pages_fit_and_do_not_complain(pages, chromium, width, dark):
    for page in pages:
        chromium.open(page, width, 800, dark)
        assert chromium.complaints == []
        assert chromium.ask("document.documentElement.scrollWidth") <= width
        assert chromium.ask(
            "[...document.querySelectorAll('svg text')].every(t => t.getBoundingClientRect().width < 400)"
        )
        ink, paper = chromium.ask(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert (light(paper) < light(ink)) == dark


def test_axes_take_the_colour_of_the_scheme(pages, chromium):
    seen = set()
    for dark in (False, True):
        chromium.open(pages[0], dark=dark)
        fill, ink = chromium.ask(
            "[getComputedStyle(document.querySelector('svg text')).fill, getComputedStyle(document.body).color]"
        )
        assert fill == ink
        seen.add(fill)
    assert len(seen) == 2


def test_paper_is_white_whatever_the_scheme(pages, chromium):
    chromium.open(pages[0], dark=True, media="print")
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.ask("document.querySelector('.numbers').checkVisibility()") is False


def test_text_on_a_phone_is_large_enough(pages, chromium):
    for page in pages:
        chromium.open(page, 360, 800)
        sizes = chromium.ask(
            "[...document.querySelectorAll('svg text')].filter(t => t.textContent && t.checkVisibility())"
            ".map(t => t.getBoundingClientRect().height)"
        )
        assert len(sizes) > 20
        assert min(sizes) > 9


def test_a_mark_under_the_pointer_is_told(pages, chromium):
    chromium.open(pages[0])
    told = chromium.ask(
        """(() => {
            const mark = document.querySelector(".mark-rect [aria-label]");
            const box = mark.getBoundingClientRect();
            const at = { bubbles: true, clientX: box.x, clientY: box.y };
            mark.dispatchEvent(new PointerEvent("pointermove", at));
            const tip = document.getElementById("tip");
            return [tip.hidden, tip.textContent, mark.getAttribute("aria-label")];
        })()"""
    )
    assert told[0] is False
    assert told[1] == told[2] != ""


def light(colour):
    return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
