"""Batches dealt out to processes. Oracle: counting; `tests/test_processes.py` compares sums with those of one."""

import pytest
from torch import distributed

from atp import processes
from atp.processes import Dealt, dealt


def of_each(batches: int, count: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Dealt]]:
    """What every one of `count` processes is dealt."""
    found = []
    monkeypatch.setattr(processes, "alone", lambda: False)
    monkeypatch.setattr(distributed, "get_world_size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        found.append(list(dealt(f"batch {index}" for index in range(batches))))
    return found


@pytest.mark.parametrize(("batches", "count"), [(4, 2), (5, 2), (6, 3), (7, 3), (8, 3), (3, 3), (9, 8)])
def test_each_batch_counts_once_and_all_pass_as_many(batches: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = of_each(batches, count, monkeypatch)
    assert sorted(one.index for own in found for one in own if one.counts) == list(range(batches))
    assert {len(own) for own in found} == {-(-batches // count)}
    assert all(one.batch == f"batch {one.index}" for own in found for one in own)
    assert all(any(one.counts for one in own) for own in found), "a process without a batch"


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_where_there_are_too_few_every_process_counts_all(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for own in of_each(batches, 3, monkeypatch):
        assert [(one.index, one.counts) for one in own] == [(index, True) for index in range(batches)]


def test_one_process_looks_at_all_in_their_order() -> None:
    assert list(dealt("abc")) == [Dealt(0, "a", True), Dealt(1, "b", True), Dealt(2, "c", True)]
