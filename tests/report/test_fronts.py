"""Quality against cost. Oracles: three runs of which one is beaten, ends of bars read off the SVG."""

import json
import math
import re

import pytest

from atp.report.page.drawing import svg
from atp.report.page.fronts import front_charts
from atp.report.page.variants import group
from atp.report.record import read_run
from atp.report.sources import read_sources
from tests.report import folders
from tests.report.rows import row


def charts(variants):
    return {chart.title: chart for chart in front_charts(variants, variants[0])}


@pytest.mark.parametrize(
    ("task", "metric", "lower"),
    [
        ("answers", "acc", False),
        ("glossary", "rougeL", False),
        ("medical-errors", "acc", False),
        ("qa", "acc", False),
        ("translation", "ter", True),
        ("speech", "wer", True),
    ],
)
def test_the_metric_and_not_the_task_says_which_way_is_better(tmp_path, task, metric, lower):
    records = []
    for name, scale, value in (("small", 0.4, 0.5), ("middle", 0.6, 0.7), ("large", 0.8, 0.6)):
        scored = folders.metrics(scale) | {"tasks": {task: folders.task(value, metric=metric)}}
        folder = folders.run(tmp_path / name, False, scored, folders.recipe(sparsity=scale))
        records.append(read_run(folder))
    alt = charts(group(records))[f"{task}, {metric} against parameters"].alt
    assert alt.split("; ")[1] == (
        "lower left is better. On the Pareto front: small."
        if lower
        else "upper left is better. On the Pareto front: small, middle."
    )


def test_a_seed_that_diverged_leaves_the_chart_drawn(tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    runs = [("dense", None, 0, 20.0, 20), ("dense", None, 1, 5000.0, 20), ("atp", 0.4, 0, 12.0, 10)]
    made = [row(s, p, seed, math.log(value), parameters=size) for s, p, seed, value, size in runs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    variants = group(read_sources([tmp_path])[0])
    assert variants[0].perplexity - variants[0].perplexity_std < 0
    drawn = svg(charts(variants)["perplexity against parameters"], "c")
    assert "log scale" in drawn
    assert "NaN" not in drawn
    (bottom,) = heights(r'layer_1_marks"><line', drawn)
    (lowest,) = heights(r'aria-label="atp [^"]*"', drawn)
    assert bottom == pytest.approx(lowest)


def heights(element, drawn):
    """Pixels from the top."""
    return [float(y) for y in re.findall(element + r' transform="translate\([^,]+,([^)]+)\)"', drawn)]
