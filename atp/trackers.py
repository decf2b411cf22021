"""Reaching the Trainer's trackers (TensorBoard, W&B, MLflow and the like), which log before user callbacks do."""

import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from atp.errors import in_one_line

logger = logging.getLogger(__name__)

IMAGE = "atp/kept"
_STEP = "train/global_step"
"""What the Trainer calls the horizontal axis where a tracker counts its own steps."""
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
        self._refused: set[type] = set()

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
        """An image, before trackers close."""
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        """One image for every tracker that takes one. A tracker that refuses is told of once, and ends no run."""
        takers = [(peer, show) for peer in self._peers for kind, show in _SHOWN.items() if isinstance(peer, kind)]
        shares = self._kept() if takers and state.is_world_process_zero else None
        for tracker, show in takers if shares else ():
            try:
                show(tracker, heat_map(shares or {}), state.global_step)
            except Exception as error:  # Pillow is missing, the network is down: each library has its own
                if type(tracker) not in self._refused:
                    logger.warning("atp: %s takes no image: %s", type(tracker).__name__, in_one_line(error))
                self._refused.add(type(tracker))


def _tensorboard(tracker: Any, image: np.ndarray, step: int) -> None:
    if tracker.tb_writer is not None:
        tracker.tb_writer.add_image(IMAGE, image, step, dataformats="HWC")


def _wandb(_: Any, image: np.ndarray, step: int) -> None:
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:
        wandb.log({IMAGE: wandb.Image(image), _STEP: step})


def _mlflow(_: Any, image: np.ndarray, step: int) -> None:
    mlflow = importlib.import_module("mlflow")
    if mlflow.active_run() is not None:
        mlflow.log_image(image, key=IMAGE, step=step)


def _trackio(_: Any, image: np.ndarray, step: int) -> None:
    trackio = importlib.import_module("trackio")
    if trackio.context_vars.current_run.get() is not None:
        trackio.log({IMAGE: trackio.Image(image), _STEP: step})


_SHOWN: dict[type[TrainerCallback], Callable[[Any, np.ndarray, int], None]] = {
    TensorBoardCallback: _tensorboard,
    WandbCallback: _wandb,
    MLflowCallback: _mlflow,
    TrackioCallback: _trackio,
}
"""Trackers that show images, and how each is given one, in the run that its callback has begun."""


def heat_map(shares: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Kinds of group side by side, blocks from top to bottom, darker for more that is kept.

    `(height, width, 3)`, uint8. A kind with one set for the whole model fills its column.
    """
    rows = max(map(len, shares.values()))
    table = np.stack([np.resize(np.array(column, np.float32), rows) for column in shares.values()], axis=1)
    colours = _NOTHING + table[..., None] * (_ALL - _NOTHING)
    return colours.round().astype(np.uint8).repeat(_CELL, axis=0).repeat(2 * _CELL, axis=1)
