"""Timing several cases in one run: each once a round, so that a machine whose speed drifts treats all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm.auto import tqdm

from atp.evaluation import peak_memory_mib, reset_peak_memory

_MATMUL = 2048
_MATMUL_ON_GPU = 8192
"""Where a product of 2,048 rows is over before it is measured."""

_COPY_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Case:
    """Something to time.

    Attributes:
        call: one timed call.
        limit: the least share of the baseline's time that FLOPs or bytes allow; None where that says nothing.
        times: how often a call does what is timed.
    """

    name: str
    call: Callable[[], object]
    limit: float | None = None
    times: int = 1


@dataclass(frozen=True)
class Result:
    """Milliseconds (median, 20th and 80th percentile of calls), and the share of the baseline's time.

    `ratio` is the median over rounds of this case's time over the first case's in the same round; `peak_mib` the
    highest memory during its calls, of the GPU or the whole process, with what other cases keep there; None where that
    cannot be known.
    """

    case: str
    calls: int
    p20_ms: float
    median_ms: float
    p80_ms: float
    ratio: float
    limit: float | None
    peak_mib: float | None


def interleaved(cases: Sequence[Case], calls: int, warmup_calls: int = 1, quiet: bool = False) -> list[Result]:
    """Time every case `calls` times, in turn; the first one is the baseline.

    Rounds go through the cases forwards and backwards in turn, so that none always follows the same one.

    Args:
        quiet: no progress bar.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    peaks: dict[str, list[float]] = {case.name: [] for case in cases}
    with timing_bar(len(cases) * (warmup_calls + calls), quiet) as bar:
        for case in cases:
            for _ in range(warmup_calls):
                case.call()
                bar.update()
        for index in range(calls):
            for case in cases if index % 2 == 0 else reversed(cases):
                took, peak = measured(case.call)
                bar.update()
                seconds[case.name].append(took / case.times)
                if peak is not None:
                    peaks[case.name].append(peak)
    baseline = seconds[cases[0].name]
    return [_result(case, seconds[case.name], baseline, max(peaks[case.name], default=None)) for case in cases]


def ceilings(device: torch.device, dtype: torch.dtype, calls: int = 5) -> dict[str, float]:
    """What this machine gives at best: `matmul_tflops` of a square product, and `copy_gb_per_s`, reads and writes."""
    size = _MATMUL if device.type == "cpu" else _MATMUL_ON_GPU
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matmul, copied = interleaved(
        [Case("matmul", lambda: a @ b), Case("copy", lambda: target.copy_(source))], calls, warmup_calls=2, quiet=True
    )
    return {
        "matmul_tflops": 2 * size**3 / matmul.median_ms / 1e9,
        "copy_gb_per_s": 2 * _COPY_BYTES / copied.median_ms / 1e6,
    }


def captured(case: Case, times: int) -> Case:
    """`case` that many times over as one CUDA graph: what the device takes, not what launching takes the host.

    Its call must find the same tensors whenever it is made, on the current device, and not wait for it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is built, tuned or allocated once is not part of a graph
        for _ in range(times):
            case.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            case.call()
    return replace(case, call=partial(_replay, graph, case), times=times * case.times)


def _replay(graph: torch.cuda.CUDAGraph, _case: Case) -> None:
    """Run `graph`, which reads the tensors of the case that it was captured from."""
    graph.replay()


def measured(call: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of one call, and the highest memory during it in MiB, if that can be known."""
    measurable = reset_peak_memory()
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start, peak_memory_mib() if measurable else None


def timing_bar(calls: int, quiet: bool = False) -> tqdm:
    """How many of `calls` have been made, shown where they take more than two seconds; updated between them."""
    return tqdm(total=calls, desc="atp: timing", unit="call", leave=False, delay=2, disable=quiet)


def percentile(seconds: Sequence[float], share: float) -> float:
    """The value that `share` of `seconds` do not exceed, between neighbours by their distance."""
    return torch.tensor(seconds, dtype=torch.float64).quantile(share).item()


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _result(case: Case, seconds: Sequence[float], baseline: Sequence[float], peak: float | None) -> Result:
    p20, p80 = percentile(seconds, 0.2), percentile(seconds, 0.8)
    ratio = statistics.median(own / other for own, other in zip(seconds, baseline, strict=True))
    median = statistics.median(seconds)
    return Result(case.name, len(seconds), p20 * 1e3, median * 1e3, p80 * 1e3, ratio, case.limit, peak)
