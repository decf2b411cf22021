"""One run's page. Oracles: the figures that went in, HTML read by another parser, WCAG's contrast formula."""

import json
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from atp.errors import CheckpointError
from atp.report import write_report
from atp.report.page import drawing
from atp.report.page.lines import Lines, evenly, line_chart, thinned
from atp.training.journal import Journal
from tests.report import folders

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)> id="x" url(#y) {{ 7 * 7 }}'
OUTSIDE = re.compile(
    r"""\s(?:src|href|action|data)\s*=\s*(?!["']#|["']data:,)|url\((?!#)|@import|https?://(?!www\.w3\.org/)"""
)


class Reader(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder):
    return write_report(folder).path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    return page_of(folders.run(tmp_path_factory.mktemp("report") / "run", recovered=folders.recovery()))


def test_the_headline_holds_what_was_measured(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    report = write_report(folders.run(tmp_path / "run"))
    rows = {row[0].text: [value.plain for value in row[1:]] for row in report.table.rows}
    assert report.table.columns == ("", "dense (base)", "dense-tuned", "pruned")
    assert rows["parameters"] == ["134.5M", "as dense", "92.05M (-31.6 %)"]
    assert rows["perplexity, held out"] == ["27.4", "-", "24.1 (-12.0 %)"]
    assert rows["pubmedqa, acc"][2] == "0.552 [0.509, 0.595] (+0.021)"
    tuned = [line for line in folders.journal() if (line.get("held_out") or {}).get("dense")][-1]
    assert rows["perplexity while training *"][1].split()[2] == str(tuned["step"])


def test_every_section_is_there(page):
    for title in ("Headline", "Alerts", "Scores on tasks", "Training", "Sample generations", "How this run was made"):
        assert f">{title}</h2>" in page
    assert "atp train configs/pubmedqa_smollm2_135m.yaml" in page
    assert "churn near the freeze" in page
    assert folders.FINGERPRINT in page


def test_every_chart_has_a_title_words_and_ids_of_its_own(page):
    read = Reader(page)
    charts = read.all("svg")
    assert len(charts) == len(read.all("figure")) == len(read.all("figcaption")) > 15
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 30 for svg in charts)
    assert len({svg["aria-label"] for svg in charts}) == len(charts)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert not re.search(r"\d\.\d{9}", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))


def test_every_chart_is_well_formed_and_themed(page):
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        root = ElementTree.fromstring(svg)
        colours = {e.get("fill") for e in root.iter("text")} - {None}
        assert colours <= {"var(--fg)"}
        assert float(root.get("viewBox").split()[2]) == 340


def test_the_page_needs_nothing_else(page):
    assert not OUTSIDE.findall(re.sub(r"<(pre|code)[^>]*>.*?</\1>", "", page, flags=re.S))
    assert len(page.encode()) < 1_000_000
    read = Reader(page)
    assert [link["href"] for link in read.all("link")] == ["data:,"]
    assert not read.all("iframe") + read.all("img")


def test_hostile_text_stays_text(tmp_path):
    measured = folders.metrics()
    measured["tasks"] |= {HOSTILE: folders.task(0.5, metric=HOSTILE)}
    measured["samples"] = [{"prompt": HOSTILE, "reference": None, "base": 7, "result": HOSTILE}, "no sample"]
    measured |= {"model": HOSTILE, "command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    lines = folders.journal(logged=3, kinds={HOSTILE: 4})
    lines.append({"step": 5, "alert": {"name": HOSTILE, "message": HOSTILE, "value": None}})
    page = page_of(folders.run(tmp_path / "run", lines, measured, folders.recipe(space=HOSTILE)))
    read = Reader(page)
    assert len(read.all("script")) == 1
    assert not read.all("img")
    assert "49" not in [text for text in read.texts if "onerror" in text]
    assert HOSTILE in read.texts
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("left", ["metrics.json", "journal.jsonl", "recipe.yaml"])
def test_one_file_of_a_run_makes_a_page(tmp_path, left):
    folder = folders.run(tmp_path / "run")
    for name in {"metrics.json", "journal.jsonl", "recipe.yaml"} - {left}:
        (folder / name).unlink()
    page = page_of(folder)
    assert f"{left} is missing" not in page
    assert page.count("is missing:") == 2
    assert not re.search(r"<section[^>]*>\s*<h2[^>]*>[^<]*</h2>\s*</section>", page)


WRONG = [
    dict.fromkeys(folders.metrics(), wrong)
    for wrong in (None, 3, "text", [], {}, {"a": {"b": 1}}, {"value": None, "parts": 3, "metrics": []}, float("nan"))
]


@pytest.mark.parametrize("measured", WRONG)
def test_no_value_of_another_type_breaks_the_page(tmp_path, measured, monkeypatch):
    without_charts(monkeypatch)
    lines = [{"step": 1, "run": measured}, {"step": 1, "kept": {"kv": measured}}, {"step": 1, "held_out": measured}]
    lines += [
        {"step": 1, "run": {"sizes": {"kv": [0, "x", None], "mlp": 3}, "blocks": {"kv": "x"}, "freeze_step": "x"}}
    ]
    lines += [{"step": 2, "kept": {"kv": [1, None, "x"]}}, {"step": 2, "alert": measured}, {"step": 2, "log": measured}]
    page_of(folders.run(tmp_path / "run", lines, measured))


def test_a_broken_model_is_said_first(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    measured = folders.metrics()
    measured["validation"]["perplexity"] = float("nan")
    folder = folders.run(tmp_path / "run", folders.journal(logged=3), measured)
    Journal(folder, writes=True).write(40, "log", {"loss": float("nan")})
    report = write_report(folder)
    assert [warning.split(":")[0] for warning in report.page.warnings] == [
        "The model that came out is broken",
        "The training loss was not finite at 1 logged step(s), first at step 40.",
    ]
    (training,) = [section for section in report.page.sections if section.anchor == "training"]
    assert training.charts[0].note == "1 training losses are not finite, first at step 40."


def without_charts(monkeypatch):
    """As if the extra were not installed."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)


def test_without_the_extra_tables_are_left_and_the_page_says_how_to_get_charts(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    page = page_of(folders.run(tmp_path / "run"))
    read = Reader(page)
    assert "pip install 'atp[report]'" in read.texts
    assert not read.all("svg")
    assert {"Loss", "MLP channels at step 400", "Parameters by part"} <= set(read.texts)
    assert any(text.startswith("Heat map of KV groups") for text in read.texts)


def test_80_blocks_over_10_000_logged_steps_stay_small(tmp_path):
    pytest.importorskip("vl_convert")
    rng = random.Random(0)
    run = folders.journal(blocks=80, logged=1, kinds={"kv": 8, "mlp": 14_336})[0]
    lines = [run]
    for step in range(1, 10_001):
        kept = {"kv": rng.choices(range(9), k=80), "mlp": rng.choices(range(14_337), k=80)}
        lines += [
            {"step": step, "log": {"loss": rng.random(), "atp/churn": rng.random()}},
            {"step": step, "kept": kept},
        ]
    page = page_of(folders.run(tmp_path / "run", lines, {}))
    assert len(page.encode()) < 3_000_000


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    folder = folders.run(tmp_path / "run")
    out = tmp_path / "a" / "page.html"
    assert write_report(folder, out).path == out
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_report(folder, tmp_path / "file" / "page.html")
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == ["page.html"]
    assert not list(tmp_path.rglob(".*"))


def test_the_values_are_json(tmp_path, monkeypatch):
    without_charts(monkeypatch)
    values = json.loads(json.dumps(write_report(folders.run(tmp_path / "run")).as_values()))
    assert values["headline"][0] == {
        "": "parameters",
        "dense (base)": "134.5M",
        "dense-tuned": "as dense",
        "pruned": "92.05M (-31.6 %)",
    }


def test_thinning_keeps_the_ends_the_peaks_and_the_order():
    rng = random.Random(1)
    points = [(step, rng.gauss(0, 1)) for step in range(10_000)]
    for limit in (10, 61, 240):
        found = thinned(points, limit)
        assert len(found) <= limit
        assert found == sorted(found)
        assert set(found) <= set(points)
        assert found[-1] == points[-1]
        assert {max(points, key=lambda p: p[1]), min(points, key=lambda p: p[1])} <= set(found)
        chosen = evenly(points, limit)
        assert (len(chosen), chosen[0], chosen[-1]) == (limit, points[0], points[-1])
    assert thinned(points[:5], 10) == points[:5]


@pytest.mark.parametrize("count", [2, 10, 20])
def test_no_two_lines_of_a_chart_look_the_same(count):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    chart = line_chart(Lines("norms", "norm", {f"line {i}": [(0, i), (1, i)] for i in range(count)}))
    looks = re.findall(
        r'<g class="mark-line[^>]*><path[^>]* stroke="([^"]+)"[^>]* stroke-dasharray="([^"]+)"', drawing.svg(chart, "c")
    )
    assert len(set(looks)) == len(looks) == count


@pytest.mark.parametrize(("name", "columns"), [("kept", 2), ("written by attention, kept", 1)])
def test_names_that_do_not_fit_side_by_side_stand_below_each_other(name, columns):
    altair = pytest.importorskip("altair")
    chart = line_chart(Lines("norms", "norm", {name: [(0, 1)], "other": [(0, 2)]}))
    line, _ = chart.draw(altair).to_dict()["layer"]
    assert line["encoding"]["color"]["legend"]["columns"] == columns


def palettes():
    """The variables of the light, the dark and the printed page."""
    css = (files("atp.report.page") / "templates" / "style.css").read_text(encoding="utf-8")
    return [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", range(3))
def test_text_and_series_stand_out_from_what_is_behind_them(theme):
    colours = palettes()[theme]
    assert len(palettes()) == 3
    for text in ("fg", "soft", "link", "good", "bad"):
        for behind in ("card", "bg"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    assert contrast(colours["fg"], colours["warn-bg"]) >= 4.5
    for series in ("empty", "rule", *(f"c{n}" for n in range(1, 9))):
        assert contrast(colours[series], colours["card"]) >= 3, series
