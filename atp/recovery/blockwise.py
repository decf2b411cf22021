"""BR, block-wise: one block, or two (CR), trained by Adam towards a target stream.

    minimise over a block's parameters   mean over tokens and features (f(h) - t)^2

h: the pruned stream before the block. What t is, the caller says: the teacher's block on the same h, or the teacher's
own stream (GP). Half-precision blocks are trained in float32 and rounded afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from atp.randomness import drawn_aside
from atp.recovery.pairs import Half
from atp.recovery.settings import RecoverySettings
from atp.recovery.streams import Stream


def train_blocks(
    student: Half,
    indices: Sequence[int],
    stream: Stream,
    targets: Stream,
    settings: RecoverySettings,
    was: float,
    error: Callable[[], float],
    device: str,
) -> None:
    """Train blocks `indices`, one after the other in the model, in place.

    Args:
        stream: before the first of them.
        targets: after the last of them.
        was: `error()`, before anything is done.
        error: of the blocks as they are, on held-out text; with `keep_best`, they end as they were when it was least,
            before the first epoch or after any.
    """
    blocks = nn.ModuleList(student.blocks[index] for index in indices)
    seed = settings.seed + indices[-1]
    with drawn_aside(blocks, seed), _in_float32(blocks), _trainable(blocks, settings) as parameters:
        best, state = was, _copy(parameters)
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        batches = stream.indices
        steps = settings.epochs * len(batches)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(settings.epochs):
            for batch in (batches[place] for place in torch.randperm(len(batches)).tolist()):
                hidden = stream[batch].to(device).float()
                for index in indices:
                    hidden = student.run(index, hidden)
                loss = mse_loss(hidden, targets[batch].to(device).float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()
            if settings.keep_best and (now := error()) < best:
                best, state = now, _copy(parameters)
        if settings.keep_best:
            for parameter, value in zip(parameters, state, strict=True):
                parameter.data.copy_(value)


@contextmanager
def _in_float32(blocks: nn.Module) -> Iterator[None]:
    dtypes = {name: tensor.dtype for name, tensor in blocks.named_parameters()}
    for parameter in blocks.parameters():
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, parameter in blocks.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def _trainable(blocks: nn.ModuleList, settings: RecoverySettings) -> Iterator[list[nn.Parameter]]:
    """What is trained, within; a LoRA is merged and gone afterwards."""
    before = {parameter: parameter.requires_grad for parameter in blocks.parameters()}
    blocks.requires_grad_(settings.train == "all")
    if settings.train == "lora":
        linears = [name for name, module in blocks.named_modules() if isinstance(module, nn.Linear)]
        config = LoraConfig(r=settings.lora_r, lora_alpha=2 * settings.lora_r, target_modules=linears)
        inject_adapter_in_model(config, blocks)
    try:
        with torch.enable_grad():
            yield [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    finally:
        for name, module in list(blocks.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(blocks.get_submodule(parent), child, module.get_base_layer())
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
