"""Measured models as tables that fit a terminal of 80 columns."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atp.commands.evaluation.figures import Measured, is_share
from atp.commands.evaluation.gates import Verdict
from atp.commands.output import print_table, show
from atp.evaluation import Difference, Estimate
from atp.report import Spread, spread

_WIDTH = 120
_UNITS = ("B", "kB", "MB", "GB", "TB")


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, where that tells the models apart."""
    last = [Path(name).name or name for name in names]
    return last if len(set(last)) == len(set(names)) else list(names)


def print_costs(models: Sequence[Measured]) -> None:
    """Sizes and speeds, a row a model."""
    rows = []
    for name, model in zip(short_names([m.name for m in models]), models, strict=True):
        result = model.result
        row = [name, _in_short(result["parameters"]), _in_short(result["flops_per_token"])]
        row += [_bytes(result.get("bytes")), "-" if (peak := result["peak_memory_mib"]) is None else f"{peak:,.0f}"]
        if "prefill" in result:
            tokens = result["decode"]["generated_tokens"]
            row += [_latency(result["prefill"]), _latency(result["decode"], tokens)]
        rows.append(row)
    columns = ["model", "params", "FLOPs", "disk", "peak MiB"]
    title = "parameters, FLOPs per token, bytes on disk, peak memory"
    if "prefill" in models[0].result:
        columns += ["prefill ms", "decode ms"]
        title += (
            f", ms of {models[0].result['prefill']['prompt_tokens']} tokens read and of one written: median (p20-p80)"
        )
    print_table(title, columns, rows, _WIDTH)
    if len({model.result["dtype"] for model in models}) > 1:
        computed = ", ".join(f"{row[0]} in {model.result['dtype']}" for row, model in zip(rows, models, strict=True))
        print(f"not like for like: {computed}; to compare speed and memory, give all one --dtype")


def print_perplexity(title: str, models: Sequence[Measured]) -> None:
    """Perplexity on `--data`, a row a model."""
    rows = [
        (
            name,
            model.result["perplexity"],
            spread(Spread(model.result["nll"], model.result["nll_stderr"]), digits=3),
            *(model.result[key] for key in ("worst_row_nll", "tokens", "tokens_per_second")),
        )
        for name, model in zip(short_names([m.name for m in models]), models, strict=True)
    ]
    print_table(title, ("model", "ppl", "nll", "worst row", "tokens", "tokens/s"), rows, _WIDTH)


def print_scores(models: Sequence[Measured]) -> None:
    """Scores on tasks: a row for each metric and model."""
    names = short_names([m.name for m in models])
    rows = [
        (f"{task}.{metric}", name, *_interval(f"{task}.{metric}", estimate), score.rows, score.truncated)
        for task, first in models[0].scores.items()
        for metric in first.metrics
        for name, model in zip(names, models, strict=True)
        for score in (model.scores[task],)
        for estimate in (score.metrics[metric],)
    ]
    title = "tasks: scores in percent with 95 % intervals; cut: rows whose prompt is longer than the context"
    _print(title, ("score", "model", "value", "95 %", "rows", "cut"), rows, len(models))


def print_differences(baseline: str, changed: Mapping[str, Mapping[str, Difference]]) -> None:
    """What changed from the baseline: a row for each figure and model."""
    names = short_names([baseline, *changed])
    rows = [
        (figure, name, *_changed(figure, difference))
        for figure in next(iter(changed.values()))
        for name, found in zip(names[1:], changed.values(), strict=True)
        for difference in (found[figure],)
    ]
    to = f" to {names[1]}" if len(changed) == 1 else ""
    title = f"changes from {names[0]}{to}: scores in points; intervals and p from the same rows of both"
    _print(title, ("figure", "model", "before", "after", "change", "95 %", "p"), rows, len(changed))


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Gates, a row for each gate and model."""
    names = short_names([verdict.model for verdict in verdicts])
    rows = [
        (
            *(verdict.gate, name, _or_dash(verdict.baseline), show(verdict.value)),
            _signed(verdict.change) + "%" * (verdict.change is not None and verdict.gate.endswith("%")),
            *(_ends(verdict.low, verdict.high, _signed), _chance(verdict.p), "FAILED" if verdict.failed else "ok"),
        )
        for name, verdict in zip(names, verdicts, strict=True)
    ]
    columns = ("fail if", "model", "before", "value", "change", "95 %", "p", "")
    _print("gates", columns, rows, len({verdict.model for verdict in verdicts}))


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], models: int) -> None:
    """A table whose second column, the model, is left out where there is one only."""
    kept = [index for index in range(len(columns)) if index != 1 or models > 1]
    print_table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], _WIDTH)


def _interval(name: str, estimate: Estimate) -> tuple[str, str]:
    scale = 100.0 if is_share(name) else 1.0
    low, high = (None if end is None else end * scale for end in (estimate.low, estimate.high))
    return show(estimate.value * scale), _ends(low, high, show)


def _changed(name: str, difference: Difference) -> tuple[str, ...]:
    """In points for shares of 1, in percent for all else."""
    scale = 100.0 if is_share(name) else 1.0
    before, after = (_in_short(value * scale) for value in (difference.baseline, difference.value))
    if is_share(name):
        change, low, high, unit = difference.difference, difference.low, difference.high, ""
    else:
        change, low, high, unit = difference.relative, difference.relative_low, difference.relative_high, "%"  # type: ignore[assignment]
    told = "-" if change is None else f"{_signed(change * 100)}{unit}"
    low, high = (None if end is None else end * 100 for end in (low, high))
    return before, after, told, _ends(low, high, _signed), _chance(difference.p)


def _ends(low: float | None, high: float | None, told: Callable[[float], str]) -> str:
    return "-" if low is None or high is None else f"{told(low)} to {told(high)}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+,.2f}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else show(value)


def _chance(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def _latency(speed: Mapping[str, float], tokens: int = 1) -> str:
    values = [speed[key] / tokens for key in ("latency_ms", "p20_ms", "p80_ms")]
    median, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({low}-{high})"


def _in_short(value: float) -> str:
    """Thousands, millions and billions by their letters."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):,.4g}{letter}"
    return f"{value:,.4g}"


def _bytes(size: float | None) -> str:
    if size is None:
        return "-"
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.3g} {unit}"
