"""Which texts are dropped, and why; the first reason that holds is the one that is counted.

| reason | a text is dropped where |
|---|---|
| `broken` | it has bytes that are no letter, or nothing but white space |
| `short` | with its prompt it has fewer than 16 tokens, or than half of what may be written where that is less |
| `repetitive` | fewer than half of the runs of four tokens that the model wrote are different ones |
| `language` | it is not, more likely than not, in a language that was asked for: code is in none |
| `held_out` | with its prompt it is, or overlaps, a row that it must be disjoint of |
| `duplicate` | with its prompt it is a row kept before, or one of the sources', blind to case and white space |
| `near_duplicate` | without its prompt it overlaps (`overlap.py`) what was written before, or a row of the sources |

Sources are the rows that prompts and real rows are taken from. What is written is compared without its prompt, for
prompts come again when all have been used, and may be most of a row.
"""

from collections.abc import Callable, Iterable, Sequence

from atp.data import Row
from atp.recovery.generation.language import language_test
from atp.recovery.generation.overlap import Overlaps
from atp.recovery.generation.settings import WritingSettings
from atp.recovery.generation.writing import Written

REASONS = ("broken", "short", "repetitive", "language", "held_out", "duplicate", "near_duplicate")

_SHORTEST_TOKENS = 16
_RUN_TOKENS, _DISTINCT = 4, 0.5

Test = Callable[[Written], bool]


class HeldOut:
    """Rows that calibration must have nothing of."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._fingerprints = {row.fingerprint for row in rows}
        self._overlaps = Overlaps(_whole(row) for row in rows)

    def has(self, row: Row) -> bool:
        """Whether `row` is one of them, or nearly."""
        return row.fingerprint in self._fingerprints or self._overlaps.overlaps(_whole(row))

    def has_prompt_of(self, row: Row) -> bool:
        """Whether whatever is written after the prompt of `row` would be nearly one of them."""
        return self.has(row) or self._overlaps.overlaps(row.prompt)


class Filters:
    """All reasons to drop a text, and the texts kept so far."""

    def __init__(self, settings: WritingSettings, sources: Sequence[Row], held_out: HeldOut) -> None:
        shortest = min(_SHORTEST_TOKENS, settings.tokens // 2)
        self._known = {row.fingerprint for row in sources}
        self._overlaps = Overlaps(_whole(row) for row in sources)
        self._tests: dict[str, Test] = {
            "broken": lambda text: not text.text.strip() or "\N{REPLACEMENT CHARACTER}" in text.text,
            "short": lambda text: len(text.start.ids) + len(text.ids) < shortest,
            "repetitive": lambda text: _repeats(text.ids),
            "language": _in_another_language(settings.languages),
            "held_out": lambda text: held_out.has(row_of(text)),
            "duplicate": lambda text: row_of(text).fingerprint in self._known,
            "near_duplicate": lambda text: self._overlaps.overlaps(text.text),
        }

    def reason(self, text: Written) -> str | None:
        """Why `text` is dropped, one of `REASONS`; None where it is kept, and what comes later compared with it."""
        found = next((name for name in REASONS if self._tests[name](text)), None)
        if found is None:
            self._known.add(row_of(text).fingerprint)
            self._overlaps.add(text.text)
        return found


def row_of(text: Written) -> Row:
    """The text as a row of data."""
    return Row(text.start.prompt, text.text)


def fit_to_mix(rows: Iterable[Row], held_out: HeldOut) -> tuple[list[Row], dict[str, int]]:
    """Real rows without those held out and those that came before, and how many of either there were."""
    kept: dict[str, Row] = {}
    dropped = {"held_out": 0, "duplicate": 0}
    for row in rows:
        reason = "held_out" if held_out.has(row) else "duplicate" if row.fingerprint in kept else None
        if reason:
            dropped[reason] += 1
        else:
            kept[row.fingerprint] = row
    return list(kept.values()), dropped


def _whole(row: Row) -> str:
    return f"{row.prompt}{row.completion}"


def _repeats(ids: Sequence[int]) -> bool:
    runs = [tuple(ids[i : i + _RUN_TOKENS]) for i in range(len(ids) - _RUN_TOKENS + 1)]
    return len(set(runs)) < _DISTINCT * len(runs)


def _in_another_language(languages: Sequence[str]) -> Test:
    is_one_of_them = language_test(languages)
    return lambda text: bool(languages) and not is_one_of_them(text.text)
