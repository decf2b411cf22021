"""Calibration rows that the model writes itself, mixed with real ones.

Source: "Rethinking Pruning Large Language Models: Benefits and Pitfalls of Reconstruction Error Minimization" (Shin et
al., EMNLP 2024): reconstruction on few real texts overfits them, and texts that the model writes itself help.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.data import Row
from atp.errors import CalibrationError, ConfigError
from atp.recovery.generation.collecting import Collected, collect, counted, starts_for
from atp.recovery.generation.filters import REASONS, Filters, HeldOut, fit_to_mix
from atp.recovery.generation.settings import WritingSettings
from atp.recovery.generation.writing import Writer


@dataclass(frozen=True)
class Mix:
    """How many rows are asked for, the `share` of them that the model writes, and where the others come from.

    Attributes:
        prompts: rows whose prompts, or first words, texts begin with; None: texts begin with a random token.
        real: rows to draw the others from.
        held_out: rows that none may be in or overlap.
    """

    rows: int
    share: float = 1.0
    prompts: Sequence[Row] | None = None
    real: Sequence[Row] = ()
    held_out: Sequence[Row] = ()

    def __post_init__(self) -> None:
        if type(self.rows) is not int or self.rows < 1:
            raise ConfigError(f"rows={self.rows!r} is not allowed: it must be an integer >= 1")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share!r} is not allowed: it must be a number in [0, 1]")
        if self.share < 1 and not self.real:
            raise ConfigError(f"share={self.share!r} is not allowed without real rows: it must be 1")

    @property
    def written(self) -> int:
        """How many rows the model is to write."""
        return round(self.rows * self.share)

    @functools.cached_property
    def usable(self) -> "Usable":
        """What is left of the sources without rows that are held out, or came before.

        Raises:
            CalibrationError: where that is too little.
        """
        held_out = HeldOut(self.held_out)
        real, dropped = fit_to_mix(self.real, held_out)
        asked = self.rows - self.written
        if len(real) < asked:
            raise CalibrationError(
                f"{asked} real rows are asked for, and there are {len(real)}{counted(dropped)}: ask for fewer rows or "
                "a larger share of written ones"
            )
        prompts = None if self.prompts is None else [row for row in self.prompts if not held_out.has_prompt_of(row)]
        if prompts == []:
            raise CalibrationError(f"all of {len(self.prompts or ())} prompts are held out: give others")
        return Usable(held_out, real, dropped, prompts)


@dataclass(frozen=True)
class Usable:
    """Sources of a mix, what was dropped of its real rows, and what its rows must be disjoint of."""

    held_out: HeldOut
    real: Sequence[Row]
    real_dropped: dict[str, int]
    prompts: Sequence[Row] | None


@dataclass(frozen=True)
class Mixed:
    """Rows, shuffled, each with whether the model wrote it; and what came of the model's attempts.

    `real_dropped` and `prompts_dropped` count rows of the sources that are held out, or (real ones) came before.
    """

    rows: Sequence[tuple[Row, bool]]
    written: Collected
    real_dropped: dict[str, int]
    prompts_dropped: int


def mixed_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mix: Mix,
    settings: WritingSettings,
    progress: bool = True,
) -> Mixed:
    """Have `model` write, filter, and mix with real rows.

    Where the model has written `settings.max_attempts` texts and too few of them passed, there are fewer rows, in the
    same share, and a warning.

    Raises:
        CalibrationError: where no text passed, no prompt can be used, or there are too few real rows.
        ConfigError: where the texts do not fit the model's context, or their language cannot be told.
    """
    draw = random.Random(settings.seed)
    usable, asked_real = mix.usable, mix.rows - mix.written
    written = Collected((), 0, dict.fromkeys(REASONS, 0))
    if mix.written:
        starts = starts_for(model, tokenizer, usable.prompts, settings.tokens, draw)
        filters = Filters(settings, [*(mix.prompts or ()), *mix.real], usable.held_out)
        written = collect(mix.written, starts, Writer(model, tokenizer, settings), filters, settings, progress)
        asked_real = round(asked_real * len(written.rows) / mix.written)
    rows = [(row, True) for row in written.rows] + [(row, False) for row in draw.sample(usable.real, asked_real)]
    draw.shuffle(rows)
    return Mixed(rows, written, usable.real_dropped, len(mix.prompts or ()) - len(usable.prompts or ()))
