"""Figures as people read them."""

import math

from atp.report.page.parts import Value, Verdict

NOTHING = "-"


def short(value: float | None, digits: int = 4) -> str:
    """`134.5M`, `30.76`, `NaN`; a dash where nothing is known."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.{digits}g}{unit}"
    return f"{value:,.{digits}g}" if abs(value) < 1e3 else f"{value:,.0f}"


def megabytes(value: float | None) -> str:
    """`371.8 MB`, from bytes."""
    if value is None or not math.isfinite(value):
        return short(value)
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def share(value: float | None) -> str:
    """`40.0 %`."""
    return short(value) if value is None or not math.isfinite(value) else f"{value * 100:.1f} %"


def compared(text: str, value: float | None, base: float | None, lower: bool | None = None, detail: str = "") -> Value:
    """A value with its distance from the base in percent; better or worse, where `lower` says what is better."""
    if value is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return Value(text, detail=detail)
    change = value / base - 1
    if abs(change) < 5e-5:
        return Value(text, "same", detail=detail)
    percent = f"{change * 100:+.1f} %" if abs(change) < 10 else f"{value / base:.0f}x"
    return Value(text, percent, verdict(change, lower), detail)


def moved(text: str, value: float | None, base: float | None, lower: bool | None, detail: str = "") -> Value:
    """As `compared`, with the difference itself: for scores, of which percents would be shares of shares."""
    if value is None or base is None or not math.isfinite(value) or not math.isfinite(base):
        return Value(text, detail=detail)
    change = value - base
    if abs(change) < 5e-4:
        return Value(text, "same", detail=detail)
    return Value(text, f"{change:+.3f}", verdict(change, lower), detail)


def verdict(change: float, lower: bool | None) -> Verdict:
    """Whether a change is for the better."""
    if lower is None or not change:
        return ""
    return "better" if (change < 0) == lower else "worse"
