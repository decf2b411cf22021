"""Peak memory. Oracle: a block of known size that is taken and given back."""

import pytest
import torch

from atp.evaluation import memory
from atp.evaluation.memory import peak_memory_mib, release_memory, reset_peak_memory

needs_linux = pytest.mark.skipif(
    torch.cuda.is_available() or not memory._CLEAR.exists(), reason="resident memory is measured on Linux without CUDA"
)


@needs_linux
def test_a_block_counts_while_measured_and_is_forgotten_on_reset():
    assert reset_peak_memory()
    before = peak_memory_mib()
    block = bytearray(b"x") * (200 << 20)
    del block
    assert peak_memory_mib() - before == pytest.approx(200, abs=20)
    assert reset_peak_memory()
    assert peak_memory_mib() - before < 100


@needs_linux
def test_released_memory_is_no_longer_resident():
    """Many blocks too small to be mapped on their own, which the allocator keeps when they are freed."""
    release_memory()
    assert reset_peak_memory()
    before = peak_memory_mib()
    blocks = [bytearray(b"x") * 100_000 for _ in range(1000)]
    assert peak_memory_mib() - before > 75
    del blocks
    release_memory()
    assert reset_peak_memory()
    assert peak_memory_mib() - before < 30


def test_unknown_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert not reset_peak_memory()
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert peak_memory_mib() is None
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\n")
    assert peak_memory_mib() == 2.0
