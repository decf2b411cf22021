"""How a text begins before the model goes on with it: with a random token (LLM-QAT, arXiv 2305.17888), or a prompt."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from atp.data import Row

_OPENING_WORDS = 8
"""Of a text without a prompt: fewer than a shingle has, so that what is written after it is its own (`overlap.py`)."""


@dataclass(frozen=True)
class Start:
    """What the model reads, `ids`, and the `prompt` that they spell; empty where they belong to the text itself."""

    ids: tuple[int, ...]
    prompt: str = ""


def random_starts(tokenizer: PreTrainedTokenizerBase, rows: int, draw: random.Random) -> Iterator[Start]:
    """Endless: one token of the vocabulary each, any as likely; BOS before it where the tokenizer begins texts with it.

    Special and added tokens (chat markup, unused places) are not drawn.

    Args:
        rows: of the model's embedding, which may have fewer than the tokenizer has tokens.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    drawn = sorted(number for number in set(tokenizer.get_vocab().values()) - special if number < rows)
    begins = begins_with(tokenizer)
    while True:
        yield Start((*begins, draw.choice(drawn)))


def prompt_starts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int | None, draw: random.Random
) -> Iterator[Start]:
    """Each row's prompt, or the first words of a text that has none, in an order drawn anew each time all were used.

    Rows that are empty or have more than `longest` tokens are left out; none are left where the iterator is empty.
    """
    starts = [_of_row(row, tokenizer) for row in rows]
    usable = [start for start in starts if start.ids and (longest is None or len(start.ids) <= longest)]
    while usable:
        yield from draw.sample(usable, len(usable))


def begins_with(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """BOS, where the tokenizer begins texts with it."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()


def _of_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> Start:
    opening = row.prompt or "".join(re.findall(r"\s*\S+", row.completion)[:_OPENING_WORDS])
    return Start(tuple(_without_end(tokenizer, opening)) if opening.strip() else (), row.prompt)


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids; a tokenizer that ends texts with EOS would have the model begin another one."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
