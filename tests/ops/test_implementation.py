"""Who computes an operation. Oracle: what is asked for, and what can be had."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from atp.ops import implementation
from atp.ops.implementation import uses_triton


def without_compiler(*_):
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize("can", [True, False])
def test_auto_means_kernels_where_they_can_be_built(can, monkeypatch, caplog):
    kernels = ModuleType("atp.ops.kernels")
    kernels.compaction = SimpleNamespace(gather=(lambda *_: None) if can else without_compiler)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(implementation, "HAS_TRITON", True)
    implementation._builds.cache_clear()
    on_a_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    assert [uses_triton(on_a_gpu, "auto") for _ in range(2)] == [can, can]
    assert uses_triton(on_a_gpu, "triton")
    assert not uses_triton(on_a_gpu, "eager")
    assert not uses_triton(torch.ones(1), "auto")
    said = [record.message for record in caplog.records]
    assert said == [] if can else len(said) == 1 and "(Failed to find C compiler): computing without them" in said[0]
    implementation._builds.cache_clear()
