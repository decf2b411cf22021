"""Parameters as engines hold them: whole, or in parts over processes (PyTorch's FSDP2, DeepSpeed's ZeRO-3).

`whole` is collective: every process has to call it, for the same parameters in the same order. One parameter, or one
module's, exists whole at a time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

_SHARDS = "_atp_shards"
"""Attribute of a parameter that is whole for a while: the one in parts that it stands for."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether `tensor` is ZeRO-3's: empty but while the very module that owns it, not one around it, runs."""
    return hasattr(tensor, "ds_tensor")


def is_ordinary(tensor: Tensor) -> bool:
    """Whether `tensor`, within a pass of the module around its owner, is a plain one, not a subclass's nor empty."""
    plain = type(tensor.data) in (Tensor, DTensor, FakeTensor)  # the last: a plain one's size, to plan with
    return plain and not is_partitioned(tensor) and tensor.numel() > 0


def shape_of(tensor: Tensor) -> torch.Size:
    """Of all of it."""
    return torch.Size(tensor.ds_shape) if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]


def replicas_of(tensor: Tensor) -> int:
    """How many times all processes together hold `tensor`, where it is sharded: more than once in a hybrid mesh."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate())


def settle(model: nn.Module) -> None:
    """Let go of what was gathered for a pass that has ended: FSDP2 may keep it for a backward pass that never comes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shards_of(parameter: Tensor) -> Tensor:
    """The parameter that lasts: `parameter` itself, or what it stands for within `gathered`."""
    return getattr(parameter, _SHARDS, parameter)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`, live; `put` writes it."""
    if is_partitioned(tensor):
        return tensor.ds_tensor.data  # type: ignore[attr-defined]
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data


def own_values(tensor: Tensor) -> Tensor:
    """`held(tensor)`, without what ZeRO-3 fills a last part up with, which may be anything; flat where it does."""
    own = held(tensor)
    if not is_partitioned(tensor):
        return own
    zero: Any = tensor
    before = distributed.get_rank(zero.ds_process_group) * own.numel()
    return own[: max(zero.ds_numel - before, 0)]


@torch.no_grad()
def whole(tensor: Tensor, instead: Tensor | None = None) -> Tensor:
    """All of `tensor`, detached; `tensor` itself where it is whole. Collective.

    Args:
        instead: what this process holds of another tensor in the same parts, which is given in place of `tensor`.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    own = held(tensor) if instead is None else instead
    own = own.to(tensor.device)
    if isinstance(tensor, DTensor):
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(own, tensor.device_mesh, tensor.placements, shape=shape, stride=stride).full_tensor()
    zero: Any = tensor
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(zero.ds_process_group))]
    distributed.all_gather(parts, own, group=zero.ds_process_group)
    return torch.cat(parts)[: zero.ds_numel].view(zero.ds_shape)


@torch.no_grad()
def part(tensor: Tensor, value: Tensor) -> Tensor:
    """What this process would hold of `value`, `(all of it)`, if it were in the same parts as `tensor`."""
    if is_partitioned(tensor):
        length, rank = held(tensor).numel(), distributed.get_rank(tensor.ds_process_group)  # type: ignore[attr-defined]
        flat = value.flatten()[rank * length : (rank + 1) * length]
        return pad(flat, (0, length - len(flat)))
    if not isinstance(tensor, DTensor):
        return value
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            parts = value.chunk(tensor.device_mesh.size(dim), dim=placement.dim)  # type: ignore[attr-defined]
            rank = tensor.device_mesh.get_local_rank(dim)
            value = parts[rank] if rank < len(parts) else value.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return value


@torch.no_grad()
def put(tensor: Tensor, own: Tensor) -> None:
    """Make `own` what this process holds of `tensor`. Collective."""
    held(tensor).copy_(own)
    if _is_at_hand(tensor):
        tensor.data.copy_(whole(tensor))


@torch.no_grad()
def scale(parameter: Tensor, factors: Tensor) -> None:
    """Multiply a trained parameter by `factors`, of its whole shape, and what DeepSpeed will overwrite it with."""
    own = held(parameter)
    own.mul_(part(parameter, factors).to(own.dtype))
    if _is_at_hand(parameter):
        parameter.data.mul_(factors.to(parameter.dtype))
    if hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param  # noqa: PLC0415  # in use then

        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter) * part(parameter, factors))
    elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:  # ZeRO-1 and 2: a slice of it, flat
        begin, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        fragment = mapping.get_hp_fragment()
        fragment.mul_(factors.flatten()[begin : begin + length].to(fragment.device))


@contextmanager
def gathered(module: nn.Module, changes: bool = False) -> Iterator[None]:
    """Within it `module` holds whole parameters, and runs by itself: the engine's hooks on it sleep. Collective.

    Args:
        changes: write back what parameters hold in the end.
    """
    if not any(is_sharded(parameter) for parameter in module.parameters()):
        yield
        return
    modules = [(m, m._parameters, m._forward_pre_hooks, m._forward_hooks) for m in module.modules()]
    stand_ins: dict[int, nn.Parameter] = {}
    for owner, parameters, _, _ in modules:
        own: dict[str, nn.Parameter | None] = {}
        for name, parameter in parameters.items():
            if parameter is not None and id(parameter) not in stand_ins:
                stand_ins[id(parameter)] = _stand_in(parameter)
            own[name] = None if parameter is None else stand_ins[id(parameter)]
        owner._parameters = own
        owner._forward_pre_hooks, owner._forward_hooks = type(owner._forward_pre_hooks)(), type(owner._forward_hooks)()
    try:
        yield
    finally:
        for owner, parameters, before, after in modules:
            owner._parameters, owner._forward_pre_hooks, owner._forward_hooks = parameters, before, after
        for stand_in in stand_ins.values() if changes else ():
            if stand_in._version:
                lasting = shards_of(stand_in)
                put(lasting, part(lasting, stand_in.detach()))


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
    setattr(made, _SHARDS, parameter)
    return made


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds all of a parameter beside its part, as it does of small ones at all times."""
    return is_partitioned(tensor) and tensor.shape == shape_of(tensor)
