"""Tables and plots of the READMEs, here and at the top, from raw results: `python benchmarks/tables.py`.

`--check` says whether the READMEs are what the results give, and changes nothing.
"""

import argparse
import sys
from pathlib import Path

from performance import tables as performance
from quality import tables as quality
from recovery import tables as recovery
from scale import tables as scale

HERE = Path(__file__).parent


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where a README is not what the results give")
    check = parser.parse_args().check
    parts = {
        HERE / "quality": quality.part(draw=not check),
        HERE / "performance": performance.part(draw=not check),
        HERE / "recovery": recovery.part(draw=not check),
        HERE / "scale": scale.part(),
        HERE.parent: quality.top_table(),
    }
    for place, part in parts.items():
        readme = place / "README.md"
        before = readme.read_text(encoding="utf-8")
        after = put(before, part)
        if not check:
            readme.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{readme} is not what the results give: run benchmarks/{Path(__file__).name}")


def put(text: str, part: str) -> str:
    """`text` with `part` between its two marks."""
    begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{part}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    main()
