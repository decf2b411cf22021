"""`--fail-if EXPR`: what a model may not be, or may not have become since its baseline.

    ppl > +3%               perplexity grew by more than 3 %
    pubmedqa.acc < -2       accuracy fell by more than 2 points (scores are in percent)
    ppl > 30                perplexity is above 30, whatever the baseline's

A number with a sign is a change from the baseline, with `%` a share of its figure; one without is the figure itself.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atp.commands.evaluation.figures import COSTS, PERPLEXITY, SPEEDS, is_share
from atp.errors import ConfigError
from atp.evaluation import Difference

_EXPRESSION = re.compile(r"(?P<name>\S+?)\s*(?P<sign>[<>])\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<percent>%?)")

_ALSO_CALLED = {"perplexity": PERPLEXITY}


@dataclass(frozen=True)
class Gate:
    """One expression: `name` may not be `above`, or else below, `limit`: a figure, a `change`, or one in `percent`."""

    text: str
    name: str
    above: bool
    limit: float
    change: bool
    percent: bool


@dataclass(frozen=True)
class Verdict:
    """A gate's outcome for one model; figures are in the gate's unit: percent for scores and for `%`.

    `low`, `high` and `p` belong to the change, and are `None` where nothing is paired.
    """

    gate: str
    model: str
    failed: bool
    baseline: float | None
    value: float
    change: float | None
    low: float | None
    high: float | None
    p: float | None


def parse_gate(text: str) -> Gate:
    """Raises `ConfigError` where `text` is no expression."""
    found = _EXPRESSION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"--fail-if {text!r} is not understood: write NAME, < or >, and a number, such as 'ppl > +3%', "
            "'pubmedqa.acc < -2' or 'ppl > 30'"
        )
    name, number = _ALSO_CALLED.get(found["name"], found["name"]), found["number"]
    change, percent = number[0] in "+-", bool(found["percent"])
    if percent and not change:
        raise ConfigError(f"--fail-if {text!r}: a share of the baseline needs a sign: write +{number}% or -{number}%")
    if percent and is_share(name):
        raise ConfigError(f"--fail-if {text!r}: scores change in points: write {number} without %")
    return Gate(text.strip(), name, found["sign"] == ">", float(number), change, percent)


def check_gates(
    gates: Sequence[Gate], has_data: bool, has_speed: bool, tasks: Mapping[str, Sequence[str]], baseline: str | None
) -> None:
    """Raise `ConfigError` where a gate's figure will not be measured, or its baseline is not given.

    Args:
        tasks: the metrics of each task.
    """
    known = [name for name in COSTS if has_speed or name not in SPEEDS]
    known += [PERPLEXITY] if has_data else []
    known += [f"{task}.{metric}" for task, metrics in tasks.items() for metric in metrics]
    for gate in gates:
        if gate.name not in known:
            near = difflib.get_close_matches(gate.name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            if gate.name == PERPLEXITY:
                hint = "it needs --data FILE; "
            elif gate.name in SPEEDS:
                hint = "it is not measured with --no-speed; "
            raise ConfigError(f"--fail-if {gate.text!r}: {gate.name!r} is unknown: {hint}known: {', '.join(known)}")
        if gate.change and baseline is None:
            raise ConfigError(f"--fail-if {gate.text!r} is a change, and of what is not said: give --baseline MODEL")


def judge(gate: Gate, model: str, found: Mapping[str, float], changed: Mapping[str, Difference] | None) -> Verdict:
    """One gate against the figures of one model, and what `changed` since its baseline.

    Raises:
        ConfigError: where the figure could not be measured here.
    """
    scale = 100.0 if is_share(gate.name) else 1.0
    difference = (changed or {}).get(gate.name)
    if gate.name not in found or (gate.change and difference is None):
        raise ConfigError(f"--fail-if {gate.text!r}: {gate.name} could not be measured for {model}: leave the gate out")
    change, low, high = _change(difference, gate.percent, scale) if difference else (None, None, None)
    value = found[gate.name] * scale
    measured = change if gate.change else value
    broken = measured is None or not math.isfinite(measured)
    failed = broken or (measured > gate.limit if gate.above else measured < gate.limit)  # type: ignore[operator]
    before, p = (difference.baseline * scale, difference.p) if difference else (None, None)
    return Verdict(gate.text, model, failed, before, value, change, low, high, p)


def _change(difference: Difference, percent: bool, scale: float) -> tuple[float | None, float | None, float | None]:
    """What changed, and the ends of its interval."""
    ends = (
        (difference.relative, difference.relative_low, difference.relative_high)
        if percent
        else (difference.difference, difference.low, difference.high)
    )
    factor = 100.0 if percent else scale
    change, low, high = (None if end is None else end * factor for end in ends)
    return change, low, high


def line(verdict: Verdict) -> str:
    """A failed gate in one line."""
    was: dict[str, Any] = {"baseline": verdict.baseline, "change": verdict.change}
    told = "".join(f", {name} {value:,.4g}" for name, value in was.items() if value is not None)
    spread = "" if verdict.low is None else f" (95 % {verdict.low:,.4g} to {verdict.high:,.4g})"
    chance = "" if verdict.p is None else f", p {verdict.p:.3g}"
    return f"failed: {verdict.gate}: {verdict.model} has {verdict.value:,.4g}{told}{spread}{chance}"
