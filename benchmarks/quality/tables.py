"""The tables of `quality/README.md` and of the project's README, from the raw rows.

Each folder `results/SETTING/` is the `--out` of one `atp compare`, of which `rows.jsonl` is committed. Those named
MODEL_DOMAIN_SPACE_STEPS, and nothing after it, are in the table at the top.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from atp.commands.comparison.journal import read_journal
from atp.report import markdown, size_plot, sparsity_plot, summarise
from atp.report.summary import Cell
from atp.strategies import DENSE, is_two_stage

HERE = Path(__file__).parent
PLOTS = {"perplexity_by_sparsity.png": sparsity_plot, "perplexity_by_size.png": size_plot}
MODELS = {"smollm2": "SmolLM2-135M", "gemma3": "Gemma-3-270M"}
AT_THE_TOP = re.compile(rf"({'|'.join(MODELS)})_([a-z]+)_(width|disp)_150")
COLUMNS = (
    *("model, text, removed", "seeds", "dense", "best two-stage rival", "`paper`"),
    *("**`atp`**", "/ rival", "gap closed"),
)


def part(draw: bool) -> str:
    """A section for every folder of rows; `draw`: write its plots, too."""
    return "\n".join(section(folder, draw) for folder in _folders())


def section(folder: Path, draw: bool) -> str:
    """The Markdown that `atp compare` writes, its headings two levels down, plots beside the rows."""
    rows = list(read_journal(folder / "rows.jsonl").values())
    cells = summarise(rows)
    for name, plot in PLOTS.items() if draw else ():
        (folder / name).write_bytes(plot(cells))
    failed = [row for row in rows if row["status"] == "failed"]
    lines = markdown(cells, failed, [f"results/{folder.name}/{name}" for name in PLOTS]).splitlines()[2:]
    versions = next(row["versions"] for row in rows if row["status"] == "ok")
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    body = "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
    return f"### {folder.name}\n\n{made_with}.\n\n{body}\n"


def top_table() -> str:
    """What matters, a line for each setting and sparsity at which `atp` has run; perplexities."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for folder in _folders():
        if found := AT_THE_TOP.fullmatch(folder.name):
            model, domain, space = found.groups()
            lines += top_lines(
                f"{MODELS[model]}, {domain}, `{space}`", summarise(read_journal(folder / "rows.jsonl").values())
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def top_lines(title: str, cells: list[Cell]) -> Iterator[tuple[str, ...]]:
    """One for each `atp` cell. Cells are sorted, so that the first rival at a sparsity, if one has run, is the best."""
    dense = next(cell for cell in cells if cell.strategy == DENSE)
    for cell in (cell for cell in cells if cell.strategy == "atp"):
        here = [other for other in cells if other.sparsity == cell.sparsity]
        rival = next((other for other in here if is_two_stage(other.strategy)), None)
        paper = next((other for other in here if other.strategy == "paper"), None)
        yield (
            f"{title} {cell.sparsity:.0%}".replace("%", " %"),
            str(cell.seeds),
            perplexity(dense),
            "" if rival is None else f"{perplexity(rival)} (`{rival.strategy}`)",
            "" if paper is None else perplexity(paper),
            f"**{perplexity(cell)}**",
            "" if cell.perplexity_to_rival is None else f"{cell.perplexity_to_rival:.2f}",
            "" if cell.gap_closed is None else f"{cell.gap_closed:.2f}",
        )


def perplexity(cell: Cell) -> str:
    """Its mean."""
    return f"{cell.perplexity.mean:.2f}"


def _folders() -> list[Path]:
    return [path.parent for path in sorted(HERE.glob("results/*/rows.jsonl"))]
