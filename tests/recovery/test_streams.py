"""Streams hold what they are given, in memory or on the disk. Oracle: the tensors themselves."""

import pytest
import torch

from atp.recovery import streams
from atp.recovery.streams import Stream


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "IN_MEMORY", streams.IN_MEMORY if request.param == "memory" else 0)
    return tmp_path


@pytest.mark.parametrize("promised", [0.5, 1, 2], ids=["too few", "exact", "too many"])
def test_batches_of_any_shape_are_as_they_were_given_whatever_bytes_were_promised(folder, promised):
    given = {3: torch.randn(2, 5, 4), 0: torch.randn(1, 5, 4).bfloat16(), 7: torch.randn(2, 5, 4).transpose(0, 1)}
    stream = Stream(int(promised * sum(batch.nbytes for batch in given.values())), folder)
    for index, batch in given.items():
        stream[index] = batch
    assert stream.indices == [3, 0, 7]
    assert all(torch.equal(stream[index], batch) for index, batch in given.items())
    assert stream.nbytes == sum(batch.nbytes for batch in given.values())


def test_passing_on_changes_no_other_stream_and_not_what_was_given(folder):
    given = torch.ones(2, 3)
    stream = Stream(given.nbytes, folder)
    stream[0] = given
    same = stream.mapped(lambda batch: batch, folder)
    stream.pass_on(lambda batch: batch + 1)
    assert stream[0].eq(2).all()
    assert same[0].eq(1).all()
    assert given.eq(1).all()


def test_what_is_passed_on_keeps_its_precision(folder):
    stream = Stream(24, folder)
    stream[0] = torch.ones(2, 3, dtype=torch.bfloat16)
    stream.pass_on(lambda batch: batch.float() / 3)
    assert torch.equal(stream[0], torch.ones(2, 3) / 3)


def test_a_large_stream_lies_on_the_disk_and_goes_with_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "IN_MEMORY", 23)
    stream = Stream(24, tmp_path)
    stream[0] = torch.ones(2, 3)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 24
    del stream
    assert not list(tmp_path.iterdir())
