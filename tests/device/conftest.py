"""The second device, as Trainer, accelerate and commands find it."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments

from atp.commands import models, recover
from atp.structure import sharding
from tests.device import second


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where models are put and trained within the test that asks for this."""
    placed = TrainingArguments.device.fget
    monkeypatch.setattr(PartialState, "default_device", second.DEVICE)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: (placed(self), second.DEVICE)[1]))
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    monkeypatch.setattr(sharding, "FakeTensor", second.SecondTensor)  # a tensor like any other, there
    for module in (models, recover):
        monkeypatch.setattr(module, "best_device", lambda: second.NAME)
    _forget()
    with second.second_device():
        yield
    _forget()


def _forget() -> None:
    """Accelerate's idea of the device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
