"""What a page is made of: sections of tables, charts and texts. Nothing here knows HTML or how a chart is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Value:
    """One cell: what it says, how far that is from something else, whether for the better, and a line in small."""

    text: str
    change: str = ""
    verdict: Verdict = ""
    detail: str = ""

    @property
    def plain(self) -> str:
        """Without any form."""
        text = f"{self.text} {self.detail}" if self.detail else self.text
        return f"{text} ({self.change})" if self.change else text


@dataclass(frozen=True)
class Table:
    """Rows under column titles; the first cell of a row is its title.

    `wide`: a card a row on a narrow screen. `prose`: cells are texts, which may wrap, and not figures.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    note: str = ""
    wide: bool = False
    prose: bool = False


@dataclass(frozen=True)
class Tile:
    """One figure that matters, in large: what changed, by how much, from what to what."""

    title: str
    value: Value
    detail: str = ""


@dataclass(frozen=True)
class Chart:
    """A picture, and the same in words and as a table.

    `alt`: what it shows, in one or two sentences. `draw`: takes the module `altair`, gives its chart. `height`: None
    where the chart's own steps say how high it is.
    """

    title: str
    alt: str
    draw: Callable[[Any], Any]
    table: Table | None = None
    note: str = ""
    height: int | None = 230


@dataclass(frozen=True)
class Sample:
    """One prompt and what models wrote, by name."""

    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """One part of the page. Empty ones are left out."""

    anchor: str
    title: str
    intro: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    items: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    code: str = ""
    tiles: tuple[Tile, ...] = ()
    folded: tuple[tuple[str, str], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show but a title."""
        return not (self.tables or self.charts or self.items or self.samples or self.code or self.folded)


@dataclass(frozen=True)
class Page:
    """A whole page. `warnings`: what a reader has to know first."""

    title: str
    summary: str
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()


def plain_table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = False, wide: bool = False
) -> Table:
    """A table of texts, or of figures that are compared with nothing."""
    values = tuple(tuple(Value(text) for text in row) for row in rows)
    return Table(caption, tuple(columns), values, prose=prose, wide=wide)
