"""Who computes an operation: its eager definition, or Triton kernels. The choice is made here, for all of them."""

import importlib.util
import os

from torch import Tensor

IMPLS = ("auto", "eager", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor, impl: str) -> bool:
    """Whether kernels compute an operation whose tensors lie where `x` does.

    Args:
        impl: one of `IMPLS`; `"auto"` means kernels on a GPU, where Triton is installed.

    Raises:
        ValueError: where `"triton"` is asked for and cannot be had.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r}: one of {', '.join(IMPLS)}")
    if impl == "triton" and not (HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError("impl 'triton' needs the package triton, and a GPU or its interpreter (TRITON_INTERPRET=1)")
    return impl == "triton" or (impl == "auto" and x.is_cuda and HAS_TRITON)
