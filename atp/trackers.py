"""Reaching the Trainer's trackers (TensorBoard, W&B, MLflow and the like), which log before user callbacks do."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

IMAGE = "atp/kept"
_CELL = 12
"""Pixels of a side of a block's square."""
_NOTHING, _ALL = np.array([253, 231, 200], np.float32), np.array([0, 68, 136], np.float32)


class Feeder(TrainerCallback):
    """Stands first in the handler's list: adds figures to every log, and an image of what is kept where one is taken.

    Args:
        add: puts figures into a log.
        kept: shares that every set keeps, by kind; None before there is a decision.
    """

    def __init__(
        self, add: Callable[[dict[str, Any]], None], kept: Callable[[], Mapping[str, Sequence[float]] | None]
    ) -> None:
        self._add, self._kept = add, kept
        self._peers: list[TrainerCallback] = []

    def join(self) -> None:
        """Go to the head of the list of the handler that is calling the caller's caller, unless there is one already.

        The Trainer hands a callback no handle on its peers: the handler is found two frames up. Without it only
        trackers miss the figures.
        """
        handler = sys._getframe(2).f_locals.get("self")
        if isinstance(handler, CallbackHandler) and not any(isinstance(c, Feeder) for c in handler.callbacks):
            handler.callbacks.insert(0, self)
            self._peers = handler.callbacks

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the trackers see it."""
        self._add(kwargs["logs"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An image."""
        self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An image, before TensorBoard closes its file."""
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        writers = [c.tb_writer for c in self._peers if isinstance(c, TensorBoardCallback) and c.tb_writer is not None]
        shares = self._kept() if writers else None
        for writer in writers if shares else ():
            writer.add_image(IMAGE, heat_map(shares or {}), state.global_step, dataformats="HWC")


def heat_map(shares: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Kinds of group side by side, blocks from top to bottom, darker for more that is kept.

    `(height, width, 3)`, uint8. A kind with one set for the whole model fills its column.
    """
    rows = max(map(len, shares.values()))
    table = np.stack([np.resize(np.array(column, np.float32), rows) for column in shares.values()], axis=1)
    colours = _NOTHING + table[..., None] * (_ALL - _NOTHING)
    return colours.round().astype(np.uint8).repeat(_CELL, axis=0).repeat(2 * _CELL, axis=1)
