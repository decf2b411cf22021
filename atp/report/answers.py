"""The three questions a user brings to a comparison, each answered in one line where the rows allow."""

import statistics
from collections.abc import Sequence

from atp.report.summary import Cell
from atp.strategies import method_of, timing_of

_TIMINGS = {
    "prune-then-tune": "before tuning",
    "tune-prune-recover": "half-way through tuning",
    "tune-then-prune": "after tuning",
    "one stage": "while tuning",
}
_TOLERANCES = (0.03, 0.10)
_BLIND = "random"
"""The criterion that does not look at the weights: its decisions do not go stale."""


def answers(cells: Sequence[Cell]) -> dict[str, str]:
    """Question -> answer; a question that the rows cannot answer is left out."""
    found = {
        "When should I prune?": _when(cells),
        "How far can I go?": _how_far(cells),
        "Do decisions drawn before tuning still hold after it?": _do_decisions_hold(cells),
    }
    return {question: answer for question, answer in found.items() if answer}


def _when(cells: Sequence[Cell]) -> str | None:
    """The best mean perplexity per timing, from best to worst, wherever two timings can be compared."""
    parts = []
    for sparsity in _sparsities(cells):
        best: dict[str, Cell] = {}
        for cell in sorted((c for c in cells if c.sparsity == sparsity), key=lambda c: c.perplexity.mean):
            best.setdefault(timing_of(cell.strategy), cell)
        if len(best) > 1:
            ranked = [f"{_TIMINGS[t]} {c.perplexity.mean:.4g} ({method_of(c.strategy)})" for t, c in best.items()]
            parts.append(f"{sparsity * 100:.4g} % removed: {', '.join(ranked)}")
    return f"by mean perplexity, {'; '.join(parts)}" if parts else None


def _how_far(cells: Sequence[Cell]) -> str | None:
    """The largest sparsity within each tolerance of dense log-perplexity."""
    pruned = [(c, c.sparsity, c.relative_nll) for c in cells if c.sparsity is not None and c.relative_nll is not None]
    if not pruned:
        return None
    parts = []
    for tolerance in _TOLERANCES:
        good = [(sparsity, -ratio, cell.strategy) for cell, sparsity, ratio in pruned if ratio <= 1 + tolerance]
        reach = f"{max(good)[0] * 100:.4g} % removed ({max(good)[2]})" if good else "none of those tried"
        parts.append(f"within {tolerance * 100:.0f} % of dense log-perplexity: {reach}")
    return "; ".join(parts)


def _do_decisions_hold(cells: Sequence[Cell]) -> str | None:
    """Mean overlap per sparsity and kind over what formulas would prune before and do prune after tuning."""
    parts = []
    for sparsity in _sparsities(cells):
        shares = [c.overlap for c in cells if c.sparsity == sparsity and _drawn_after(c.strategy) and c.overlap]
        if shares:
            kinds = [f"{kind} {statistics.fmean(s[kind] for s in shares) * 100:.0f} %" for kind in shares[0]]
            parts.append(f"{sparsity * 100:.4g} % removed: {', '.join(kinds)}")
    return f"of the groups pruned before, pruned after too, at {'; '.join(parts)}" if parts else None


def _sparsities(cells: Sequence[Cell]) -> list[float]:
    return sorted({cell.sparsity for cell in cells if cell.sparsity is not None})


def _drawn_after(strategy: str) -> bool:
    return timing_of(strategy) == "tune-then-prune" and not method_of(strategy).startswith(_BLIND)
