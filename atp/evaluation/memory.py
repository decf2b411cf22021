"""Peak memory of a stretch of work: call `reset_peak_memory()`, work, then `peak_memory_mib()`.

On CUDA the peak of what torch allocated on the current device; on Linux without CUDA the peak resident memory of this
process, weights and libraries included. Not covered: other accelerators, other systems, other processes of a
distributed run.
"""

import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes as "set the peak resident memory back to what is resident now" (`man 5 proc_pid_clear_refs`)."""


def reset_peak_memory() -> bool:
    """Start measuring; false where this machine cannot, and then `peak_memory_mib()` would tell of earlier work."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return _resident_peak_mib() is not None


def peak_memory_mib() -> float | None:
    """MiB at the highest point since `reset_peak_memory()`; `None` where that cannot be known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident_peak_mib()


def release_memory() -> None:
    """Give back what is no longer used, so that the next measurement does not begin with it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":  # glibc keeps freed memory for later, and the system counts it as resident
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _resident_peak_mib() -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("VmHWM:")]  # "VmHWM:   123456 kB"
    return int(found[0][1]) / 1024 if found else None
