"""Transfers. Oracle: each tensor moved by itself."""

import pytest
import torch

from atp.transfers import together


@pytest.mark.parametrize("lengths", [(3, 16, 1), (0, 5), ()])
def test_tensors_arrive_as_they_were_and_aligned(lengths):
    tensors = [torch.arange(n, dtype=dtype) for n in lengths for dtype in (torch.int64, torch.float32, torch.int32)]
    found = together(tensors, torch.device("meta"))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in tensors]
    assert all(t.storage_offset() % 16 == 0 for t in found)


def test_one_transfer_moves_all_of_a_dtype(monkeypatch):
    moved = []
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(self) or move(self.clone(), "cpu"))
    tensors = [torch.arange(3.0), torch.tensor([True, False]), torch.arange(20.0)]
    found = together(tensors, torch.device("meta"))
    assert [len(t) for t in moved if t.dtype == torch.float32] == [16 + 32]
    assert len(moved) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


def test_what_is_there_is_not_copied():
    tensors = [torch.arange(3.0), torch.arange(4.0)]
    assert [t.data_ptr() for t in together(tensors, torch.device("cpu"))] == [t.data_ptr() for t in tensors]
