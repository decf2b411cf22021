"""What a training step of a model needs, told from its shapes: memory of each device, arithmetic, messages, time.

Memory is counted by running the step on fake tensors, which have sizes and no values, and adding up what is alive:
forward and backward, whatever the family. What engines do to it is arithmetic. Time is this machine's, from models of
one block and of three of the same shapes.

Not covered: what allocators lose to fragments and libraries take for themselves; offloading; pipeline, tensor and
context parallelism; time of messages that hide behind arithmetic.
"""

import statistics
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel, masking_utils

from atp.bench.copies import attached, on_the_same_tensors
from atp.bench.timing import measured
from atp.bench.train_step import adapted, learning_step
from atp.config import ATPConfig
from atp.evaluation import flops_per_token
from atp.layers import Attachment, attach
from atp.models import quantised
from atp.structure.live import base_layer, causal_lm
from atp.structure.space import Axis, Space

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

LIVE_PARAMETERS = 1_000_000_000
"""Of ZeRO-3, gathered at a time at most: DeepSpeed's `stage3_max_live_parameters`, whose default nobody changes."""

STREAMS = 6
"""Tensors of `(rows, length, hidden_size)` that the final refit holds, of a device's share of the rows
(`training.propagation`)."""

Model = TypeVar("Model", bound=nn.Module)

_ADAM = 2
"""Moments a trained parameter."""


@dataclass(frozen=True)
class Plan:
    """What one device holds, in bytes, and what one optimizer step takes.

    Attributes:
        memory: by what it is for.
        refit: what the final refit of its share of the rows holds besides weights, once; quantised weights are not
            refitted.
        flops: of the step on one device, adapters and attention included.
        overhead_flops: of these, the generator's.
        messages: bytes that a device sends in a step: `lora` for plain LoRA on this engine, `atp` what pruning adds.
        touched: bytes that arithmetic reads and writes at least: weights forwards and backwards, and activations;
            `atp` what the lasso and the generator's optimizer read and write.
    """

    memory: dict[str, int]
    refit: int
    flops: float
    overhead_flops: float
    messages: dict[str, int]
    touched: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())


def plan(
    base: PreTrainedModel,
    config: ATPConfig,
    engine: str,
    devices: int,
    rows: int,
    length: int,
    lora_rank: int,
    checkpointing: bool = False,
    bits: int | None = None,
) -> Plan:
    """A step of `rows` times `length` tokens on each of `devices`.

    Args:
        base: on the meta device, in the dtype that it will be trained in; under bfloat16 autocast if that is its dtype.
        bits: of the decoder's linear weights, where they are quantised.
    """
    model = adapted(base, lora_rank, checkpointing)
    attachment = attached(model, config)
    fuses = as_computed(config, engine, bits).impl != "eager"
    activations = _activations(adapted(base, lora_rank, checkpointing), attachment.space, rows, length, fuses)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = _bytes(p for p in model.parameters() if not p.requires_grad)
    if bits is not None:
        linears = [base_layer(module).weight for module in attachment.modules.values()]
        weights += sum(w.numel() * bits // 8 - w.nbytes for w in linears)
    adapters = _bytes(trained)
    masks = sum(s.size for s in attachment.space.sets)
    generator = _generator_parameters(config, attachment)
    memory = _held(engine, devices, attachment, weights, adapters) | {
        "activations": activations,
        "generator and masks": 4 * (2 + _ADAM) * generator + 8 * masks,
    }
    with _faked(on_the_same_tensors(base)) as fake:
        per_token = flops_per_token(fake)
    passes = 2 + checkpointing  # forwards; backwards to the inputs only, for base weights are frozen
    tokens, flops = rows * length, 0.0
    flops += tokens * (passes * per_token + 2 * (1 + passes) * sum(p.numel() for p in trained))
    flops += rows * _attention_flops(base, length) * (passes + 1.5)
    hidden = base.config.get_text_config().hidden_size
    return Plan(
        memory=memory,
        refit=0 if bits else STREAMS * -(-config.refit_rows // devices) * length * hidden * base.dtype.itemsize,
        flops=flops,
        overhead_flops=6.0 * generator * len(attachment.space.structure.blocks),
        messages=_messages(engine, devices, weights, adapters, masks, attachment, checkpointing),
        touched={"step": passes * weights + 2 * activations, "atp": 3 * adapters + 20 * generator},
    )


def seconds_here(
    build: Callable[[int], PreTrainedModel],
    blocks: int,
    config: ATPConfig,
    engine: str,
    rows: int,
    length: int,
    lora_rank: int,
    checkpointing: bool = False,
    bits: int | None = None,
    calls: int = 3,
) -> float:
    """Seconds of a step of a model of `blocks` blocks on this machine, from one of one block and one of three.

    What the engine does besides is not in them; how it has layers compute is.

    Args:
        build: makes a model of as many blocks.
        bits: of its linear weights, where they are to be quantised.
        calls: timed calls of each, after a first one that is not; the median counts.
    """
    config = as_computed(config, engine, bits)

    def timed(count: int) -> float:
        base = build(count) if bits is None else quantised(build(count), bits)
        step = learning_step(base, config, lora_rank, rows, length, checkpointing)
        step()
        return statistics.median(measured(step)[0] for _ in range(calls))

    one, three = timed(1), timed(3)
    return one + (blocks - 1) * (three - one) / 2


def as_computed(config: ATPConfig, engine: str, bits: int | None) -> ATPConfig:
    """`config` as layers compute there: each by itself where weights are quantised or ZeRO-3 shows them to one only."""
    return replace(config, impl="eager") if engine == "zero3" or bits else config


def _activations(model: PeftModel, space: Space, rows: int, length: int, fuses: bool) -> int:
    """Bytes above weights, gradients and optimizer at the step's highest point, in `mode="joint"`.

    Args:
        fuses: LoRA and its base layer are one operation.
    """
    for axis in _axes(space):
        assert axis.is_identity is not None  # it asks for values, and is remembered
    with _faked(model):
        attachment = attach(model, space)
        if fuses:
            attachment.fuse_adapters()
        attachment.require_gradients(True)
        ids = torch.zeros(rows, length, dtype=torch.long)
        with (
            _no_packed_rows(),
            _Alive((*model.parameters(), *model.buffers(), *attachment.masks.values(), ids)) as alive,
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=causal_lm(model).dtype == torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    return alive.peak


def _held(engine: str, devices: int, attachment: Attachment, weights: int, adapters: int) -> dict[str, int]:
    """Weights, gradients and optimizer states of one device."""
    lm, states = attachment.lm, _ADAM * adapters
    if engine == "ddp":  # of several, gradients twice: parameters' and buckets'
        copies = 2 if devices > 1 else 1
        return {"base weights": weights, "adapters": adapters, "gradients": copies * adapters, "optimizer": states}
    if engine == "zero2":
        bucket = 4 * lm.config.get_text_config().hidden_size ** 2  # as the Trainer sets it where "auto"
        return {
            "base weights": weights,
            "adapters": adapters,
            "gradients": adapters // devices + bucket,
            "optimizer": (states + adapters) // devices,  # and the masters
        }
    share = {"base weights": weights // devices, "adapters": adapters // devices}
    if engine == "zero3":
        parameters = sum(p.numel() for p in lm.parameters())
        gathered = min(LIVE_PARAMETERS, parameters) * (weights + adapters) // parameters
        share |= {"gradients": adapters // devices, "optimizer": (states + adapters) // devices}
    else:
        blocks = [lm.get_submodule(block.path) for block in attachment.space.structure.blocks]
        units = sorted(_bytes(block.parameters()) for block in blocks)
        rest = _bytes(lm.parameters()) - sum(units)
        gathered = sum(units[-2:]) + rest  # one that computes, one that is fetched; embedding, norm and head
        share |= {"gradients": adapters // devices, "optimizer": states // devices}
    return share | {"gathered": gathered}


def _messages(
    engine: str, devices: int, weights: int, adapters: int, masks: int, attachment: Attachment, checkpointing: bool
) -> dict[str, int]:
    """Bytes that one device sends, by ring algorithms: (n - 1)/n of a tensor for a gather, twice that for a sum.

    What is recomputed is gathered once more by ZeRO-3; FSDP2 has it at hand for the backward pass by then.
    """
    once = (devices - 1) / devices
    lora = 2 * adapters  # reduced, and gathered again
    sharded = engine in ("fsdp2", "zero3")
    if sharded:
        lora = adapters + 2 * (weights + adapters)  # gathered forwards and backwards
    if engine == "zero3" and checkpointing:
        blocks = [attachment.lm.get_submodule(block.path) for block in attachment.space.structure.blocks]
        lora += sum(_bytes(block.parameters()) for block in blocks)
    extra = 4 * (2 * masks + masks)  # gradients summed, the decision handed on
    if sharded:
        sizes = {s.name: s.size for s in attachment.space.sets}
        extra += 4 * 2 * sum(sizes[axis.set] for axis in _axes(attachment.space))  # the lasso's norms
    return {"lora": int(once * lora), "atp": int(once * extra)}


def _axes(space: Space) -> Iterator[Axis]:
    return (axis for linear in space.linears for axis in (linear.cols, linear.rows) if axis is not None)


def _generator_parameters(config: ATPConfig, attachment: Attachment) -> int:
    """Of the encoder and its projections, counted roughly: 12 d^2 a layer, and d for every logit of one block."""
    width, blocks = config.generator_hidden_size, len(attachment.space.structure.blocks)
    logits = sum(s.size for s in attachment.space.sets) // blocks
    return config.generator_layers * 12 * width**2 + width * (logits + blocks)


def _attention_flops(base: PreTrainedModel, length: int) -> float:
    """Of one row forwards: scores and their weighted sum, half of them masked."""
    config = base.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * config.num_hidden_layers * config.num_attention_heads * head * length**2


def _bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, while they live.

    Args:
        there: tensors that are there already, whose views are nothing new.

    Attributes:
        peak: the most bytes at a time.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in there})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = size = storage.nbytes()
                weakref.finalize(storage, self._gone, size)
                self._now += size
                self.peak = max(self.peak, self._now)
        return output

    def _gone(self, size: int) -> None:
        self._now -= size


@contextmanager
def _no_packed_rows() -> Iterator[None]:
    """Where it cannot look at positions, transformers takes rows for packed ones and makes a mask of all pairs."""
    looking = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looking


@contextmanager
def _faked(model: Model) -> Iterator[Model]:
    """Let a model on the meta device seem to lie on the CPU, where autocast and attention are as in training."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty_like(tensor, device="cpu")
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
                setattr(module, name, made[id(tensor)])
        yield model
