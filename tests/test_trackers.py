"""Images for trackers that are not installed here. Oracle: stand-ins with the part of their API that is used.

What they stand for is checked by hand against the libraries, offline; TensorBoard's own file is read in
`test_monitoring.py`.
"""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from atp.trackers import IMAGE, Feeder, heat_map

SHARES = {"kv": [1.0, 0.5], "mlp": [0.25, 0.0]}


class Run:
    """A library with a run going on: `logged` holds what its image was made from, its name and step."""

    def __init__(self):
        self.logged = []
        self.run = object()
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def active_run(self):
        return self.run

    def Image(self, array):  # noqa: N802
        return array

    def log(self, values):
        ((name, image), (axis, step)) = values.items()
        assert axis == "train/global_step"
        self.logged.append((image, name, step))

    def log_image(self, image, key, step):
        self.logged.append((image, key, step))


class Joining(TrainerCallback):
    def __init__(self, feeder):
        self.feeder = feeder

    def on_init_end(self, args, state, control, **kwargs):
        self.feeder.join()


def silent(kind):
    """A tracker's callback as the Trainer holds it, which needs no library and logs nothing itself."""
    quiet = {f"on_{event}": lambda *_, **__: None for event in ("init_end", "evaluate", "train_end")}
    return type(kind.__name__, (kind,), quiet | {"__init__": lambda _: None, "__del__": lambda _: None})()


def handled(tmp_path, *kinds, kept=lambda: SHARES, first=True):
    """The events that show images, handled with these trackers in place."""
    joining = Joining(Feeder(lambda logs: None, kept))
    handler = CallbackHandler([*map(silent, kinds), joining], None, None, None, None)
    args, control = TrainingArguments(str(tmp_path)), TrainerControl()
    state = TrainerState(global_step=7, is_world_process_zero=first)
    handler.on_init_end(args, state, control)
    handler.on_evaluate(args, state, control, metrics={})
    handler.on_train_end(args, state, control)


TRACKERS = [("wandb", WandbCallback), ("mlflow", MLflowCallback), ("trackio", TrackioCallback)]


@pytest.mark.parametrize(("name", "kind"), TRACKERS)
def test_a_tracker_gets_the_image_at_the_step(tmp_path, monkeypatch, name, kind):
    monkeypatch.setitem(sys.modules, name, library := Run())
    handled(tmp_path, kind)
    assert [(key, step) for _, key, step in library.logged] == [(IMAGE, 7)] * 2
    assert all(np.array_equal(image, heat_map(SHARES)) for image, _, _ in library.logged)


@pytest.mark.parametrize(("name", "kind"), TRACKERS)
def test_none_without_a_run_before_a_decision_or_from_another_process(tmp_path, monkeypatch, name, kind):
    monkeypatch.setitem(sys.modules, name, library := Run())
    handled(tmp_path, kind, first=False)
    handled(tmp_path, kind, kept=lambda: None)
    library.run = None
    handled(tmp_path, kind)
    assert library.logged == []


def test_a_tracker_that_refuses_is_told_of_once_and_the_others_get_theirs(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", broken := Run())
    monkeypatch.setitem(sys.modules, "mlflow", library := Run())
    broken.Image = None
    with caplog.at_level(logging.WARNING):
        handled(tmp_path, WandbCallback, MLflowCallback)
    assert len(library.logged) == 2
    assert [message.split(": ")[1] for message in caplog.messages if message.startswith("atp")] == [
        "WandbCallback takes no image"
    ]
