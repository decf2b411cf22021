"""A model writes until enough of its texts have passed the filters, or as many were written as may be."""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.data import Row
from atp.errors import CalibrationError, ConfigError
from atp.recovery.generation.filters import REASONS, Filters, row_of
from atp.recovery.generation.settings import WritingSettings
from atp.recovery.generation.starts import Start, begins_with, prompt_starts, random_starts
from atp.recovery.generation.writing import Writer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """Rows that passed, of `attempts` texts written; the others by the reason why they were dropped."""

    rows: Sequence[Row]
    attempts: int
    dropped: dict[str, int]


def collect(
    wanted: int, starts: Iterator[Start], writer: Writer, filters: Filters, settings: WritingSettings, progress: bool
) -> Collected:
    """Write until `wanted` rows have passed; where `settings.max_attempts` were not enough for it, warn of it.

    A batch has no more texts than are wanted still, so that none is written in vain.

    Raises:
        CalibrationError: where none passed.
    """
    rows: list[Row] = []
    attempts, dropped = 0, Counter(dict.fromkeys(REASONS, 0))
    seeds = random.Random(settings.seed)
    with tqdm(total=wanted, desc="atp: writing", unit="text", disable=not progress, leave=False) as bar:
        while len(rows) < wanted and attempts < settings.max_attempts:
            size = min(settings.batch_size, wanted - len(rows), settings.max_attempts - attempts)
            for text in writer.write(list(islice(starts, size)), seeds.getrandbits(63)):
                reason = filters.reason(text)
                if reason is None:
                    rows.append(row_of(text))
                    bar.update()
                else:
                    dropped[reason] += 1
            attempts += size
            bar.set_postfix(dropped=dropped.total())
    _check_enough(len(rows), wanted, attempts, dropped)
    return Collected(rows, attempts, dict(dropped))


def starts_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Row] | None,
    tokens: int,
    draw: random.Random,
) -> Iterator[Start]:
    """Endless starts that leave room for so many tokens: of `prompts`, or where that is None random tokens.

    Raises:
        ConfigError: where a single token leaves no room.
        CalibrationError: where no prompt does.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = None if context is None else context - tokens
    if longest is not None and longest < 1 + len(begins_with(tokenizer)):
        raise ConfigError(
            f"tokens={tokens} is not allowed: the model's context has {context}, with what they begin with"
        )
    if prompts is None:
        return random_starts(tokenizer, model.get_input_embeddings().weight.shape[0], draw)
    starts = prompt_starts(prompts, tokenizer, longest, draw)
    first = next(starts, None)
    if first is None:
        raise CalibrationError(
            f"none of {len(prompts)} prompts can be used: they are empty, or leave no room for {tokens} "
            f"tokens in the model's context of {context}: give others or ask for fewer tokens"
        )
    return chain([first], starts)


def counted(dropped: dict[str, int]) -> str:
    """What was dropped, to put behind a sentence; nothing where that is nothing."""
    counts = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count)
    return f" (dropped: {counts})" if counts else ""


def _check_enough(found: int, wanted: int, attempts: int, dropped: dict[str, int]) -> None:
    if not found:
        raise CalibrationError(f"none of {attempts} texts passed{counted(dropped)}: write longer ones, or filter less")
    if found < wanted:
        logger.warning("atp: only %d of %d texts passed, of %d written%s", found, wanted, attempts, counted(dropped))
