"""README.md's tables and the plots, from the raw rows: `python benchmarks/quality/tables.py`.

Each folder `results/SETTING/` is the `--out` of one `atp compare`, of which `rows.jsonl` is committed. `--check` says
whether the README is what the rows give, and changes nothing.
"""

import argparse
import json
import sys
from pathlib import Path

from atp.report import markdown, size_plot, sparsity_plot, summarise

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
PLOTS = {"perplexity_by_sparsity.png": sparsity_plot, "perplexity_by_size.png": size_plot}


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the README is not what the rows give")
    arguments = parser.parse_args()
    readme = HERE / "README.md"
    before = readme.read_text(encoding="utf-8")
    head, _, rest = before.partition(BEGIN)
    after = f"{head}{BEGIN}\n\n{tables(draw=not arguments.check)}\n{END}{rest.partition(END)[2]}"
    if arguments.check:
        sys.exit(0 if before == after else f"{readme} is not what the rows give: run {Path(__file__).name}")
    readme.write_text(after, encoding="utf-8")


def tables(draw: bool) -> str:
    """One section a setting, in alphabetical order."""
    return "\n".join(section(path.parent, draw) for path in sorted(HERE.glob("results/*/rows.jsonl")))


def section(folder: Path, draw: bool) -> str:
    """The Markdown that `atp compare` writes, its headings two levels down, plots beside the rows."""
    rows = {row["name"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}
    cells = summarise(list(rows.values()))
    for name, plot in PLOTS.items() if draw else ():
        (folder / name).write_bytes(plot(cells))
    failed = [row for row in rows.values() if row["status"] == "failed"]
    lines = markdown(cells, failed, [f"results/{folder.name}/{name}" for name in PLOTS]).splitlines()[2:]
    versions = next(row["versions"] for row in rows.values() if row["status"] == "ok")
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    body = "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
    return f"### {folder.name}\n\n{made_with}.\n\n{body}\n"


if __name__ == "__main__":
    main()
