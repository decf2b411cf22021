"""Random numbers drawn aside: the global states belong to the run, and stay as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def drawn_aside(model: nn.Module | None = None, seed: int | None = None) -> Iterator[None]:
    """Within it draws, on the CPU and on the GPUs that `model` computes on, leave the global states alone.

    Args:
        model: with none, only draws on the CPU are meant.
        seed: to begin with; with none, states are as they are.
    """
    gpus = [] if model is None else _gpus(model)
    with torch.random.fork_rng(gpus):
        if seed is not None:  # not `torch.manual_seed`, which seeds every GPU's state, also those that are not restored
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _gpus(model: nn.Module) -> list[int]:
    """Those that hold parameters, and the process's own, where offloaded ones are brought to."""
    found = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    return sorted(found | ({torch.cuda.current_device()} if torch.cuda.is_initialized() else set()))
