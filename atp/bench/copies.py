"""Models of their own on the same tensors, so that many cases need the memory of one."""

import copy
from typing import Any

from transformers import PreTrainedModel


def on_the_same_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own, whose parameters and buffers are those of `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
