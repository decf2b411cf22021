"""Tables, Markdown and plots. Oracles: widths counted, cells found again, PNG's signature, matplotlib's artists."""

import builtins

import pytest

from atp.commands.output import print_table
from atp.report import PlotsUnavailableError, Spread, markdown, printed_table, size_plot, sparsity_plot, summarise
from atp.report.tables import count, spread
from tests.report.rows import ROWS, failed

CELLS = summarise(ROWS)


@pytest.mark.parametrize("scores", [{}, {"tasks": {"qa": {"value": 0.5}}}])
@pytest.mark.parametrize("rates", [(), ("recipe",)])
def test_every_row_has_every_column_and_is_narrow(scores, rates):
    other = {"recipe": {"training": {"learning_rate": 5e-4}}, "validation": {"nll": 9.0, "perplexity": 8103.1}}
    given = [*ROWS, *(row | other for row in ROWS if rates and row["status"] == "ok")]
    columns, rows = printed_table(summarise([row | scores for row in given]))
    assert ("rate" in columns) == bool(rates)
    assert columns[-1] == ("scores\n/ dense" if scores else "train\ns")
    assert all(len(row) == len(columns) for row in rows)
    assert {row[-1] for row in rows} == ({"100 %"} if scores else {"60"})
    lines = [*rows, *zip(*(title.split("\n") * 2 for title in columns), strict=False)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    assert sum(widths) + 2 * len(widths) <= 100


@pytest.mark.parametrize("width", [None, 80])
def test_what_a_terminal_could_take_for_markup_is_printed_as_it_is(capsys, width):
    names = ("lr[a]", "lr[b]", "[/x]", "[bold]", "a:warning:", "\\[c]")
    print_table("[title]", ("[run]", "[ppl]"), [(name, 1.5) for name in names], width)
    printed = capsys.readouterr().out
    for text in ("[title]", "[run]", "[ppl]", *names):
        assert text in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Spread(30.637, 0.13), "30.64 ± 0.13"),
        (Spread(30.637, None), "30.64"),
        (Spread(1451.2, 33.3), "1,451 ± 33"),
        (Spread(3.2e9, 1.5e9), "3.20e+09 ± 1.5e+09"),
    ],
)
def test_spreads_read_well(value, text):
    assert spread(value) == text


def test_counts():
    assert [count(v) for v in (12.0, 55_584, 134_515_008, 8.03e9)] == ["12", "55.58k", "134.5M", "8.03G"]


def test_markdown_holds_tables_answers_failures_and_plots():
    text = markdown(CELLS, [failed("paper", 0.4, 0)], ["a.png"])
    assert "## 20 % of the prunable parameters removed" in text
    assert "- `paper-0.4-0`: exit status -9: killed by SIGKILL" in text
    assert "![a.png](a.png)" in text
    assert "**How far can I go?**" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    (atp,) = [line for line in lines if line.startswith("| `atp`") and "10.50 ± 0.74" in line]
    assert "| 72 % |" in atp
    assert "Failed" not in markdown(CELLS)


def test_markdown_says_that_runs_shared_the_machine():
    assert "shared the machine" not in markdown(CELLS)
    shared = summarise([*ROWS[:-1], ROWS[0] | {"name": "dense-None-9", "seed": 9, "jobs": 3}])
    assert "Up to 3 runs shared the machine" in markdown(shared)


def test_plots_are_png_images():
    pytest.importorskip("matplotlib")
    for draw in (sparsity_plot, size_plot):
        assert draw(CELLS).startswith(b"\x89PNG")


def test_plots_show_every_point_once(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), save(self, *a, **k))[1])
    sparsity_plot(CELLS)
    (axes,) = seen[0].axes
    assert axes.get_xlabel() == "prunable parameters removed (%)"
    points = {(round(x), round(y, 3)) for bar in axes.containers for x, y in zip(*bar.lines[0].get_data(), strict=True)}
    assert points == {(c.sparsity * 100, round(c.perplexity.mean, 3)) for c in CELLS if c.sparsity}
    labels = [text.get_text() for text in seen[0].legends[0].get_texts()]
    assert sorted(labels) == sorted({cell.strategy for cell in CELLS})


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PlotsUnavailableError, match=r"pip install 'atp\[plots\]'"):
        sparsity_plot(CELLS)
