"""Who computes an operation: its eager definition, or Triton kernels. The choice is made here, for all of them."""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from atp.errors import in_one_line

logger = logging.getLogger(__name__)

IMPLS = ("auto", "eager", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor, impl: str) -> bool:
    """Whether kernels compute an operation whose tensors lie where `x` does.

    Args:
        impl: one of `IMPLS`; `"auto"` means kernels on a GPU, where Triton is installed and can build them.

    Raises:
        ValueError: where `"triton"` is asked for and cannot be had.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r}: one of {', '.join(IMPLS)}")
    if impl == "triton" and not (HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError("impl 'triton' needs the package triton, and a GPU or its interpreter (TRITON_INTERPRET=1)")
    if impl == "auto" and x.is_cuda and HAS_TRITON:
        return torch.compiler.is_compiling() or _builds(x.device)  # what is compiled goes by Triton anyway
    return impl == "triton"


@cache
def _builds(device: torch.device) -> bool:
    """Whether kernels can be built there: that takes a C compiler, Python's headers, and a GPU that Triton knows."""
    try:
        from atp.ops.kernels import compaction  # noqa: PLC0415 - triton is optional

        compaction.gather(torch.ones(2, 2, device=device), None, None)
    except Exception as error:  # of compilers, drivers and Triton alike
        logger.warning("atp: Triton cannot build kernels here (%s): computing without them", in_one_line(error))
        return False
    return True
