"""Timings. Oracle: a clock that the cases themselves move."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from unittest.mock import MagicMock

import pytest
import torch
from tqdm.auto import tqdm

from atp.bench import timing
from atp.bench.timing import Case, captured, interleaved


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed, as `time.perf_counter` gives them."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def lasting(clock, name, *seconds):
    """A case whose calls take `seconds`, one after the other."""
    left = list(seconds)

    def call():
        clock[0] += left.pop(0)

    return Case(name, call, limit=0.5)


def test_median_and_percentiles_leave_the_warm_up_out(clock):
    dense = lasting(clock, "dense", 100.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    [result] = interleaved([dense], calls=5)
    assert (result.calls, result.p20_ms, result.median_ms, result.p80_ms) == (5, 1800.0, 3000.0, 4200.0)
    assert (result.ratio, result.limit) == (1.0, 0.5)


def test_a_ratio_is_taken_within_a_round(clock):
    """A machine that slows down tenfold half-way changes no ratio."""
    dense = lasting(clock, "dense", 1.0, 1.0, 1.0, 10.0, 10.0)
    pruned = lasting(clock, "pruned", 1.0, 0.6, 0.6, 6.0, 6.0)
    assert interleaved([dense, pruned], calls=4)[1].ratio == pytest.approx(0.6)


def test_a_call_that_does_it_often_counts_as_often(clock):
    dense, pruned = lasting(clock, "dense", *[1.0] * 3), replace(lasting(clock, "pruned", *[2.0] * 3), times=4)
    dense, pruned = interleaved([dense, pruned], calls=2)
    assert (pruned.median_ms, pruned.p20_ms, pruned.ratio) == (500.0, 500.0, 0.5)


def test_a_graph_does_what_a_case_does_so_many_times(monkeypatch):
    """CUDA is played: what is called while a graph is captured is put down, and done again by `replay`."""
    done, graphs = [], []

    class Graph:
        def __init__(self):
            self.steps = []

        def replay(self):
            done.extend(self.steps)

    @contextmanager
    def capturing(graph):
        before = len(done)
        yield
        graph.steps, done[before:] = done[before:], []
        graphs.append(graph)

    for name, stand_in in (("Stream", MagicMock()), ("current_stream", MagicMock()), ("stream", MagicMock())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    weights = cycle("ab")
    case = captured(Case("decode", lambda: done.append(next(weights)), limit=0.5), times=4)
    assert done == list("abab")  # warmed up, each weight of them
    case.call()
    case.call()
    assert done == list("abab") * 3
    assert (len(graphs), case.name, case.limit, case.times) == (1, "decode", 0.5, 4)


def test_every_case_has_its_own_highest_peak(clock, monkeypatch):
    peaks = iter([10.0, 500.0, 300.0, 20.0])  # dense, pruned, pruned, dense
    monkeypatch.setattr(timing, "reset_peak_memory", lambda: True)
    monkeypatch.setattr(timing, "peak_memory_mib", lambda: next(peaks))
    cases = [lasting(clock, "dense", 1.0, 1.0, 1.0), lasting(clock, "pruned", 1.0, 1.0, 1.0)]
    assert [result.peak_mib for result in interleaved(cases, calls=2)] == [20.0, 500.0]


def test_ceilings_are_in_their_units(clock, monkeypatch):
    """Every call takes a second: so many operations and bytes of 10^12 and 10^9."""
    monkeypatch.setattr(timing, "measured", lambda call: (1.0, None))
    found = timing.ceilings(torch.device("cpu"), torch.float32, calls=1)
    assert found["matmul_tflops"] == pytest.approx(2 * 2048**3 / 1e12)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 256 * 2**20 / 1e9)


def test_rounds_go_forwards_and_backwards(clock):
    order = []
    cases = [Case(name, lambda name=name: (order.append(name), clock.__setitem__(0, clock[0] + 1))) for name in "abc"]
    interleaved(cases, calls=2, warmup_calls=0)
    assert "".join(order) == "abccba"


def test_progress_counts_every_call_once(clock, monkeypatch):
    bars = []
    monkeypatch.setattr(timing, "tqdm", lambda **settings: bars.append(tqdm(**settings)) or bars[-1])
    cases = [Case(name, lambda: clock.__setitem__(0, clock[0] + 1)) for name in "abc"]
    interleaved(cases, calls=2)
    assert [(bar.n, bar.total) for bar in bars] == [(9, 9)]


def test_ceilings_are_taken_without_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(timing, "measured", lambda call: (1.0, None))
    monkeypatch.setattr(timing, "tqdm", lambda **settings: tqdm(**settings | {"delay": 0, "mininterval": 0}))
    timing.ceilings(torch.device("cpu"), torch.float32, calls=1)
    assert capsys.readouterr().err == ""
