"""How training went: losses, budget, what is kept, churn, entropy, LoRA norms, and quality on held-out rows."""

import re

from atp.report.journal import Journal, Series
from atp.report.page.lines import Lines, line_chart
from atp.report.page.parts import Chart, Section
from atp.report.values import finite

KINDS = {
    "kv": "KV groups",
    "value": "value dimensions",
    "mlp": "MLP channels",
    "hidden": "hidden dimensions",
    "attention_in": "read by attention",
    "attention_out": "written by attention",
    "mlp_in": "read by the MLP",
    "mlp_out": "written by the MLP",
    "whole_block": "whole blocks",
    "whole_attention": "whole attentions",
    "whole_mlp": "whole MLPs",
}
"""What people read for the names of group kinds."""

_LORA = re.compile(r"^atp/lora_norm_(.+)_(kept|pruned)$")


def kind_title(kind: str) -> str:
    """A kind in words."""
    return KINDS.get(kind, kind)


def training_section(journal: Journal) -> Section:
    """Every curve that the journal has values for."""
    freeze = frozen_at(journal)
    charts = [line_chart(lines) for lines in _curves(journal, freeze)]
    return Section(
        "training",
        "Training",
        _intro(journal),
        charts=tuple(chart for chart in charts if chart),
    )


def frozen_at(journal: Journal) -> int | None:
    """The step from which the decision was fixed: as planned, unless the first log that says so came earlier."""
    logged = [step for step, value in journal.series("atp/frozen") if value >= 1]
    planned = finite(journal.run.get("freeze_step"))
    known = [*logged[:1], *([] if planned is None else [int(planned)])]
    return min(known, default=None)


def _intro(journal: Journal) -> str:
    total, last = finite(journal.run.get("total_steps")), journal.last_step
    if last is None:
        return ""
    return f"{last:,} optimizer steps" + (f" of {total:,.0f} planned." if total and total > last else ".")


def _curves(journal: Journal, freeze: int | None) -> list[Lines]:
    log, held_out = journal.series, journal.measured
    lost = journal.not_finite("loss")
    note = f"{len(lost)} training losses are not finite, first at step {lost[0]:,}." if lost else ""
    return [
        Lines(
            "Loss",
            "nats per token",
            {"training": log("loss"), "evaluation": log("eval_loss")},
            freeze=freeze,
            note=note,
        ),
        Lines(
            "Held-out text, same rows for both",
            "nats per token",
            {"masks off (dense)": held_out("dense"), "masks on (pruned)": held_out("pruned")},
            freeze=freeze,
            note=_held_out_note(journal),
        ),
        Lines(
            "Budget: sparsity asked and reached",
            "share of prunable parameters removed",
            {"asked": log("atp/budget"), "reached": log("atp/sparsity")},
            ".0%",
            freeze,
            zero=True,
        ),
        Lines("Entropy of the decision", "entropy", {"entropy": log("atp/entropy")}, ",~r", freeze, True),
        Lines("Budget loss", "loss", {"budget loss": log("atp/budget_loss")}, ",~r", freeze, True),
        Lines("Temperature", "temperature", {"temperature": _moving(log("atp/temperature"))}, ",~r", freeze, True),
        Lines("LoRA group norms", "mean norm", _norms(journal), ",~r", freeze, True),
        Lines("Parameters", "parameters if exported now", {"parameters": log("atp/parameters")}, "~s", freeze),
        Lines("Learning rate", "learning rate", {"learning rate": log("learning_rate")}, "~e", freeze, True),
        Lines("Gradient norm", "norm", {"gradient norm": log("grad_norm")}, ",~r", freeze, True),
    ]


def decision_charts(journal: Journal) -> list[Chart | None]:
    """How much is kept of each kind of group, and how much of the decision changes from step to step."""
    freeze = frozen_at(journal)
    kept = {kind_title(name.removeprefix("atp/kept_")): journal.series(name) for name in journal.scalars("atp/kept_")}
    churn = {"churn": journal.series("atp/churn")}
    return [
        line_chart(Lines("Kept groups", "share kept", kept, ".0%", freeze)),
        line_chart(Lines("Churn of the decision", "share of groups changed", churn, "~%", freeze, True)),
    ]


def _moving(series: Series) -> Series:
    """Nothing where it is the same throughout."""
    return series if len({value for _, value in series}) > 1 else []


def _norms(journal: Journal) -> dict[str, Series]:
    """By kind, of what is kept and of what is pruned."""
    matches = [match for name in journal.scalars("atp/lora_norm_") if (match := _LORA.match(name))]
    return {f"{kind_title(m[1])}, {m[2]}": journal.series(m[0]) for m in matches}


def _held_out_note(journal: Journal) -> str:
    rows = [rows for _, line in journal.held_out if (rows := finite(line.get("rows")))]
    return f"{rows[-1]:,.0f} rows." if rows else ""
