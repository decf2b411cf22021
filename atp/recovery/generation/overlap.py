"""Which texts share so much that they are near duplicates: shingles of 13 words, as contamination checks use them.

Two texts overlap where more than half of the shingles of the one that has fewer are the other's too; so a text inside a
longer one is found from either side. Words are runs of letters and digits, blind to case. A text of fewer than 13 words
has no shingle and overlaps nothing: compare such ones by `Row.fingerprint`. Scripts without spaces have few words, and
are compared by long stretches only.

Exact, not sketched: the index holds a number of 64 bits for every word of every text, which is some 200 bytes a word.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

SHINGLE_WORDS = 13
"""GPT-3's check of its training text (arXiv 2005.14165, appendix C) counts overlaps of 13 words."""

OVERLAP = 0.5

_WORD = re.compile(r"\w+")


class Overlaps:
    """Texts to compare others with."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._holders: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: list[int] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Compare with `text` too from now on."""
        found = _shingles(text)
        for shingle in found:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(found))

    def overlaps(self, text: str) -> bool:
        """Whether `text` is a near duplicate of one that was added."""
        found = _shingles(text)
        shared = Counter(holder for shingle in found for holder in self._holders.get(shingle, ()))
        return any(count > OVERLAP * min(len(found), self._sizes[holder]) for holder, count in shared.items())


def _shingles(text: str) -> set[int]:
    words = _WORD.findall(text.lower())
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}
