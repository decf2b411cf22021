"""Rows of finished runs -> one `Cell` per strategy and sparsity: means, spreads, and distances to dense and the rivals.

Where a strategy has run at several learning rates, its cell is of the one with the lowest mean log-perplexity.

"The rival" at a sparsity is the two-stage strategy (`atp.strategies.is_two_stage`) with the lowest mean
log-perplexity there. Every seed weighs the same. Not covered: significance; with three seeds the spread says enough.
"""

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from atp.report.values import lower_is_better, number_at
from atp.strategies import DENSE, is_two_stage

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean, and sample standard deviation (n - 1), `None` with a single value."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Cell:
    """One strategy at one asked sparsity (`None` for dense); what cannot be known is `None`.

    `learning_rate` is the best, by `nll`, of those tried with the most seeds: `default` where the recipe names none;
    `by_rate`: perplexities at each.
    `nll` is held-out log-perplexity in nats per token, `worst_row_nll` the highest of a held-out row in any run,
    far above `nll` where a model breaks down on some rows (rows of earlier versions do not tell). `scores`: means by
    task. `relative_performance`: a score over dense's, or dense's
    over it where less is better, mean over tasks (ATP, arXiv 2412.14426, Section 4), of the runs
    that were scored; `None` where the two were not scored on the same tasks. `gap_closed`: the
    share of the distance from the rival's nll to dense's that is gone, 0 for the rival itself, 1 for a model as
    good as dense. `perplexity_to_rival`, `relative_nll` and the `*_to_dense` figures are ratios. Latencies are
    medians over seeds: a prompt read, one token written; memory is the peak of training. `overlap`: per group kind,
    the share of the groups pruned by the first decision drawn that the final one prunes too. `jobs`: how
    many runs shared the machine, at most.
    """

    strategy: str
    sparsity: float | None
    learning_rate: str
    by_rate: dict[str, Spread]
    seeds: int
    perplexity: Spread
    nll: Spread
    worst_row_nll: float | None
    scores: dict[str, Spread]
    relative_performance: float | None
    gap_closed: float | None
    perplexity_to_rival: float | None
    relative_nll: float | None
    achieved_sparsity: float | None
    parameters: float
    flops_per_token: float
    prefill_ms: float
    prefill_to_dense: float | None
    decode_ms: float
    decode_to_dense: float | None
    peak_memory_mib: float | None
    memory_to_dense: float | None
    train_seconds: float
    overlap: dict[str, float] | None
    jobs: int


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """Cells by sparsity, dense first, then from the best perplexity to the worst. Failed rows do not count."""
    tried: dict[tuple[str, float | None], dict[str, list[Row]]] = {}
    for row in rows:
        if row["status"] == "ok":
            by_rate = tried.setdefault((row["strategy"], row["sparsity"]), {})
            by_rate.setdefault(_learning_rate(row), []).append(row)
    grouped = {key: _best(by_rate.values()) for key, by_rate in tried.items()}
    dense = grouped.get((DENSE, None))
    cells = []
    for (strategy, sparsity), members in grouped.items():
        rivals = [g for (name, at), g in grouped.items() if is_two_stage(name) and at == sparsity]
        rival = min(rivals, key=lambda group: _mean(group, _nll), default=None)
        cells.append(_cell(strategy, sparsity, tried[strategy, sparsity], members, dense, rival))
    return sorted(cells, key=lambda cell: (cell.sparsity or 0.0, cell.perplexity.mean))


def _best(by_rate: Collection[list[Row]]) -> list[Row]:
    """Runs at the best learning rate, of those at which as many seeds ended well as at any."""
    seeds = max(len(group) for group in by_rate)
    return min((group for group in by_rate if len(group) == seeds), key=lambda group: _mean(group, _nll))


def by_sparsity(cells: Sequence[Cell]) -> list[tuple[float | None, list[Cell]]]:
    """What one table shows: the cells of one sparsity under dense, which stands alone where nothing is pruned."""
    dense = [cell for cell in cells if cell.sparsity is None]
    sparsities = sorted({cell.sparsity for cell in cells if cell.sparsity is not None})
    tables: list[tuple[float | None, list[Cell]]] = [
        (sparsity, dense + [cell for cell in cells if cell.sparsity == sparsity]) for sparsity in sparsities
    ]
    return tables or ([(None, dense)] if dense else [])


def _cell(
    strategy: str,
    sparsity: float | None,
    by_rate: Mapping[str, Sequence[Row]],
    rows: Sequence[Row],
    dense: Sequence[Row] | None,
    rival: Sequence[Row] | None,
) -> Cell:
    nll, perplexity, scores = _spread(rows, _nll), _spread(rows, _perplexity), _scores(rows)
    prefill, decode = _median(rows, _prefill_ms), _median(rows, _decode_ms)
    memory = _mean_known(rows, _peak_memory)
    return Cell(
        strategy=strategy,
        sparsity=sparsity,
        learning_rate=_learning_rate(rows[0]),
        by_rate={rate: _spread(group, _perplexity) for rate, group in by_rate.items()},
        seeds=len(rows),
        perplexity=perplexity,
        nll=nll,
        worst_row_nll=max(_known(rows, _worst_row_nll), default=None),
        scores=scores,
        relative_performance=_relative(scores, _scores(dense) if dense else {}, _lower(rows)),
        gap_closed=_gap_closed(nll.mean, dense, rival),
        perplexity_to_rival=_ratio(perplexity.mean, _mean(rival, _perplexity) if rival else None),
        relative_nll=_ratio(nll.mean, _mean(dense, _nll) if dense else None),
        achieved_sparsity=_mean_known(rows, lambda row: row.get("pruning", {}).get("sparsity")),
        parameters=_mean(rows, lambda row: measured(row)["parameters"]),
        flops_per_token=_mean(rows, lambda row: measured(row)["flops_per_token"]),
        prefill_ms=prefill,
        prefill_to_dense=_ratio(prefill, _median(dense, _prefill_ms) if dense else None),
        decode_ms=decode,
        decode_to_dense=_ratio(decode, _median(dense, _decode_ms) if dense else None),
        peak_memory_mib=memory,
        memory_to_dense=_ratio(memory, _mean_known(dense, _peak_memory) if dense else None),
        train_seconds=_mean(rows, lambda row: row["training"]["train_runtime"]),
        overlap=_overlap(rows),
        jobs=max(row.get("jobs", 1) for row in rows),
    )


def measured(row: Row) -> Mapping[str, Any]:
    """Size and speed of the model that a run ended with: the exported one, or the dense one."""
    return row["pruned"] if "pruned" in row else row["tuned"]


def _gap_closed(nll: float, dense: Sequence[Row] | None, rival: Sequence[Row] | None) -> float | None:
    """`(rival - nll) / (rival - dense)`; unknown where the rival is no worse than dense."""
    if not dense or not rival:
        return None
    start, end = _mean(rival, _nll), _mean(dense, _nll)
    return (start - nll) / (start - end) if start > end else None


def _scores(rows: Sequence[Row]) -> dict[str, Spread]:
    """By task, over the runs that were scored."""
    scored = [row for row in rows if row.get("tasks")]
    return {task: _spread(scored, _score_on(task)) for task in (scored[0]["tasks"] if scored else {})}


def _score_on(task: str) -> Callable[[Row], float]:
    return lambda row: row["tasks"][task]["value"]


def _relative(scores: Mapping[str, Spread], dense: Mapping[str, Spread], lower: Set[str]) -> float | None:
    if not scores or scores.keys() != dense.keys() or not all(score.mean for score in dense.values()):
        return None
    shares = {task: score.mean / dense[task].mean for task, score in scores.items()}
    if not all(shares[task] for task in shares.keys() & lower):
        return None
    return statistics.fmean(1.0 / share if task in lower else share for task, share in shares.items())


def _lower(rows: Sequence[Row]) -> set[str]:
    """Tasks whose scores are better the lower they are."""
    scored = [row for row in rows if row.get("tasks")]
    tasks = scored[0]["tasks"].items() if scored else ()
    return {task for task, score in tasks if lower_is_better(score.get("metric", ""))}


def _overlap(rows: Sequence[Row]) -> dict[str, float] | None:
    found = [o for row in rows if (o := row.get("pruning", {}).get("overlap_with_start")) is not None]
    return {kind: statistics.fmean(o[kind] for o in found) for kind in found[0]} if found else None


def _learning_rate(row: Row) -> str:
    rate = number_at(row, "recipe", "training", "learning_rate")
    return "default" if rate is None else f"{rate:.6g}"


def _nll(row: Row) -> float:
    return row["validation"]["nll"]


def _worst_row_nll(row: Row) -> float | None:
    return row["validation"].get("worst_row_nll")


def _perplexity(row: Row) -> float:
    return row["validation"]["perplexity"]


def _prefill_ms(row: Row) -> float:
    return measured(row)["prefill"]["latency_ms"]


def _decode_ms(row: Row) -> float:
    return measured(row)["decode"]["latency_ms_per_token"]


def _peak_memory(row: Row) -> float | None:
    return row["training"].get("peak_memory_mib")


def _spread(rows: Sequence[Row], of: Callable[[Row], float]) -> Spread:
    values = [of(row) for row in rows]
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _mean(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    return statistics.fmean(of(row) for row in rows)


def _mean_known(rows: Sequence[Row], of: Callable[[Row], float | None]) -> float | None:
    known = _known(rows, of)
    return statistics.fmean(known) if known else None


def _known(rows: Sequence[Row], of: Callable[[Row], float | None]) -> list[float]:
    return [value for row in rows if (value := of(row)) is not None]


def _median(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    return statistics.median(of(row) for row in rows)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
