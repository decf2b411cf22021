"""A second device, made of the CPU: its tensors hold one of the CPU each, and PyTorch's CPU code computes with those.

As with CUDA, tensors of one operation must lie on one device, but for numbers without dimensions and for indices, and
so must the random generator. Importing this registers the device with PyTorch, for good: in a process of its own only.

Not shown by it: memory, streams, autocast, precision, speed, and what is done where a tensor `is_cuda`.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"

_ops: Any = torch.ops.aten
_MOVING = {_ops.copy_.default, _ops._to_copy.default}
_INDEXING = {_ops.index.Tensor, _ops.index_put.default, _ops.index_put_.default, _ops._index_put_impl_.default}
_FILLING = {torch.tensor, torch.as_tensor, torch.asarray}


class _Backend:
    """What PyTorch asks of `torch.second`."""

    is_available: ClassVar = staticmethod(lambda: True)
    is_initialized: ClassVar = staticmethod(lambda: True)
    _is_in_bad_fork: ClassVar = staticmethod(lambda: False)
    device_count: ClassVar = staticmethod(lambda: 1)
    current_device: ClassVar = staticmethod(lambda: 0)
    manual_seed_all: ClassVar = staticmethod(lambda seed: None)  # the CPU's generator is drawn from
    get_rng_state: ClassVar = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state: ClassVar = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype: ClassVar = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class SecondTensor(Tensor):
    """Says that it lies on the second device, and has its values in `on_cpu`."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "SecondTensor":
        made: SecondTensor = Tensor._make_wrapper_subclass(
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
        )
        made.on_cpu = on_cpu
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> "SecondTensor":
        return SecondTensor(inner["on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: of a tensor of the second device, outside of second_device()")

    # What PyTorch has no dispatch for.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "SecondTensor") -> None:
        self.on_cpu = value.on_cpu

    def tolist(self) -> Any:
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def untyped_storage(self) -> Any:
        return self.on_cpu.untyped_storage()

    def storage(self) -> Any:
        return self.on_cpu.storage()


@contextmanager
def second_device() -> Iterator[None]:
    """Within it, tensors can be on the second device.

    Raises:
        RuntimeError: at its end, for all that CUDA would have refused; an error within a backward pass on a device
            that is made in Python ends the process.
    """
    refused: list[str] = []
    with _Filling(), _Dispatch(refused):
        yield
    if refused:
        raise RuntimeError("\n".join(dict.fromkeys(refused)))


class _Dispatch(TorchDispatchMode):
    """Every operation: checked, and computed on the CPU."""

    def __init__(self, refused: list[str]) -> None:
        super().__init__()
        self._refused = refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        values = list(_leaves((*args, *kwargs.values())))
        ours = [value for value in values if isinstance(value, SecondTensor)]
        asked = kwargs.get("device")
        wanted = bool(ours) if asked is None else _is_second(asked)
        if reason := _refusal(func, args, values, bool(ours), wanted):
            self._refused.append(f"{func}: {reason}, {_place()}")
        kwargs = {name: _mapped(_on_cpu, value) for name, value in kwargs.items()}
        if wanted and asked is not None:
            kwargs["device"] = torch.device("cpu")
        known = {id(tensor.on_cpu): tensor for tensor in ours}  # what is changed in place stays itself
        return _mapped(_placing(known, wanted), func(*_mapped(_on_cpu, args), **kwargs))


class _Filling(TorchFunctionMode):
    """`torch.tensor` and the like fill a tensor where dispatch does not see it: on the CPU, then."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and _is_second(kwargs.get("device", args[0].device)):
            kwargs = {"dtype": args[0].dtype} | kwargs | {"device": DEVICE}
            func, args = torch.tensor, args[1:]
        if func in _FILLING and _is_second(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested lists and tuples; PyTorch's own way takes half of a run's time."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(change, part) for part in value])
    return change(value) if isinstance(value, Tensor) else value


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.on_cpu if isinstance(tensor, SecondTensor) else tensor


def _placing(known: Mapping[int, SecondTensor], wanted: bool) -> Callable[[Tensor], Tensor]:
    def place(tensor: Tensor) -> Tensor:
        ours = known.get(id(tensor))
        return ours if ours is not None else SecondTensor(tensor) if wanted else tensor

    return place


def _refusal(func: Any, args: Sequence[Any], values: Sequence[Any], ours: bool, wanted: bool) -> str | None:
    """Why CUDA would not do this; None where it would."""
    if wanted and any(isinstance(value, torch.Generator) for value in values):
        return "a generator of the CPU for a tensor of another device"
    if not ours or func in _MOVING:
        return None
    indices = [id(index) for index in args[1]] if func in _INDEXING else []
    joined = func not in _INDEXING and "foreach" not in str(func) and any(isinstance(a, list | tuple) for a in args)
    for value in values:
        if not isinstance(value, Tensor) or isinstance(value, SecondTensor) or id(value) in indices:
            continue
        if value.dim() or joined or (func._schema.is_mutable and value is args[0]):
            return f"tensors of two devices, {[tuple(v.shape) for v in values if isinstance(v, Tensor)]}"
    return None


def _place() -> str:
    """The line that asked, but for what PyTorch and this file add."""
    frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "in a backward pass"
