"""The sections of a page of several runs, each measured against a baseline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atp.errors import ConfigError
from atp.report.answers import answers
from atp.report.page.fronts import front_charts
from atp.report.page.parts import Page, Section, Table, Value, plain_table
from atp.report.page.recovery import recoveries_section
from atp.report.page.regressions import PERPLEXITY_TOLERANCE, data_warnings, regressions
from atp.report.page.tasks import tasks_section
from atp.report.page.texts import NOTHING, compared, megabytes, moved, share, short
from atp.report.page.variants import Variant, group
from atp.report.record import Record
from atp.report.summary import Cell, Spread, summarise
from atp.report.tables import spread
from atp.report.values import finite, lower_is_better, number_at

_SETTINGS, _SHOWN = 60, 80
_COLUMNS = 5
"""Runs that get a column each in a table of settings."""


def comparison_page(
    records: Sequence[Record], baseline: str | None, failed: Sequence[Mapping[str, Any]]
) -> tuple[Page, tuple[str, ...]]:
    """The page, and what is worse than the baseline.

    Raises:
        ConfigError: where no run is called `baseline`.
    """
    variants = group(records)
    base = _baseline(variants, baseline)
    variants = [base, *(variant for variant in variants if variant is not base)]
    worse = regressions(variants, base)
    sections = (
        Section("headline", "Runs side by side", _intro(base), tables=(headline(variants, base),)),
        _regressions_section(worse, variants, base),
        Section("fronts", "Quality against size and speed", charts=tuple(front_charts(variants, base))),
        tasks_section([(variant.name, dict(variant.scores)) for variant in variants if variant.scores]),
        recoveries_section({record.name: record.recovery for record in records}),
        Section("answers", "Answers", items=tuple(f"{q} {a}" for q, a in answers(_cells(records)).items())),
        Section("settings", "Settings that differ", tables=_settings_tables(variants)),
        Section("failed", "Failed runs", items=tuple(_failure(row) for row in failed[:_SHOWN])),
    )
    seeds = "" if len(records) == len(variants) else f", {len(records)} runs with their seeds"
    page = Page(
        "Comparison of runs",
        f"{len(variants)} experiments{seeds} · baseline {base.name}",
        tuple(section for section in sections if not section.is_empty),
        (*data_warnings(records), *_notes(records)),
    )
    return page, tuple(worse)


def headline(variants: Sequence[Variant], base: Variant) -> Table:
    """A row a run; figures with their distance from the baseline's."""
    tasks = dict.fromkeys((s.task, s.metric) for variant in variants for s in variant.scores.values())
    columns = (
        *("run", "sparsity", "parameters", "bytes", "prompt, ms", "decode, ms per token"),
        *(
            "peak memory, MiB",
            "peak memory of training, MiB",
            "perplexity",
            *(f"{task}, {metric}" for task, metric in tasks),
        ),
    )
    rows = [
        (
            Value(variant.name, "baseline" if variant is base else ""),
            Value(share(variant.first.sparsity) if variant.first.sparsity else NOTHING),
            *_costs(variant, base),
            _perplexity(variant, base),
            *(_score(variant, base, task, metric) for task, metric in tasks),
        )
        for variant in variants
    ]
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i].text != NOTHING for row in rows)]
    return Table(
        "Runs side by side",
        tuple(columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
        wide=True,
    )


def _costs(variant: Variant, base: Variant) -> list[Value]:
    def value(of: Callable[[Variant], float | None], text: Callable[[float | None], str] = short) -> Value:
        found = of(variant)
        return compared(text(found), found, None if variant is base else of(base), True)

    return [
        value(lambda each: each.parameters),
        value(lambda each: each.cost("bytes"), megabytes),
        value(lambda each: each.cost("prefill", "latency_ms")),
        value(lambda each: each.cost("decode", "latency_ms_per_token")),
        value(lambda each: each.cost("peak_memory_mib")),
        value(lambda each: finite(number_at(each.first.metrics, "training", "peak_memory_mib"))),
    ]


def _perplexity(variant: Variant, base: Variant) -> Value:
    value, std = variant.perplexity, variant.perplexity_std
    text = short(value) if value is None or std is None else spread(Spread(value, std))
    return compared(text, value, None if variant is base else base.perplexity, True)


def _score(variant: Variant, base: Variant, task: str, metric: str) -> Value:
    now, before = variant.scores.get(task), base.scores.get(task)
    if now is None or now.metric != metric:
        return Value(NOTHING)
    comparable = before is not None and before.metric == metric and variant is not base
    start = before.value if comparable and before else None
    return moved(short(now.value, 3), now.value, start, lower_is_better(metric), now.interval)


def _baseline(variants: Sequence[Variant], name: str | None) -> Variant:
    if name is None:
        return variants[0]
    for variant in variants:
        if name in (variant.name, *(record.name for record in variant.records)):
            return variant
    known = ", ".join(variant.name for variant in variants[:12])
    raise ConfigError(f"--baseline {name} is none of the runs: give one of {known}")


def _intro(base: Variant) -> str:
    return (
        f"Differences are from {base.name}, the baseline. Perplexity: mean and "
        "standard deviation over seeds, where there are several; latency: median over seeds."
    )


def _regressions_section(worse: Sequence[str], variants: Sequence[Variant], base: Variant) -> Section:
    rule = (
        f"Worse than {base.name}: perplexity by more than {PERPLEXITY_TOLERANCE:.0%}; scores where items paired with "
        "the baseline's say so, or, without items, where 95 % intervals do not overlap."
    )
    items = tuple(worse) or ("None.",)
    measured = [variant for variant in variants if variant.perplexity is not None or variant.scores]
    return Section("regressions", "Regressions", rule, items=items[:_SHOWN] if len(measured) > 1 else ())


def _settings_tables(variants: Sequence[Variant]) -> tuple[Table, ...]:
    """A row a setting that is not the same in all; a column a run, or, where there are many, who has which value."""
    shown = {variant.name: variant.first for variant in variants if variant.first.recipe}
    differing = list(differences(shown).items())[:_SETTINGS]
    if not differing:
        return ()
    caption = "Settings of the recipe that are not the same"
    if len(shown) > _COLUMNS:
        rows = [[setting, _who(values)] for setting, values in differing]
        return (plain_table(caption, ("setting", "values"), rows, prose=True, wide=True),)
    rows = [
        [setting, *(next((v[:120] for v, names in values.items() if name in names), NOTHING) for name in shown)]
        for setting, values in differing
    ]
    return (plain_table(caption, ("setting", *shown), rows, prose=True, wide=True),)


def _who(values: Mapping[str, list[str]]) -> str:
    """`0.4: atp 40 %, paper 40 %; 0.2: all others`."""
    most = max(values, key=lambda value: len(values[value]))
    rest = sorted((value for value in values if value != most), key=lambda value: len(values[value]))
    named = [f"{value[:120]}: {', '.join(values[value])}" for value in rest]
    several = len(values[most]) > 2
    return "; ".join([*named, f"{most[:120]}: {'all others' if several else ', '.join(values[most])}"])


def differences(records: Mapping[str, Record]) -> dict[str, dict[str, list[str]]]:
    """Setting -> value -> names of the runs that have it, for settings that are not the same in all that have them.

    A setting that a run lacks tells nothing: another version wrote it, or the whole section is off, which is told.
    """
    settings = {name: record.settings for name, record in records.items()}
    found: dict[str, dict[str, list[str]]] = {}
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        values: dict[str, list[str]] = {}
        for name, each in settings.items():
            if key in each or key == "atp":
                values.setdefault(str(each.get(key, "on")), []).append(name)
        if len(values) > 1:
            found[key] = values
    return found


def _cells(records: Sequence[Record]) -> list[Cell]:
    """Of the rows that tell all that a summary needs."""
    return summarise([record.metrics for record in records if _complete(record)])


def _complete(record: Record) -> bool:
    paths = (("prefill", "latency_ms"), ("decode", "latency_ms_per_token"), ("parameters",), ("flops_per_token",))
    needed = [number_at(record.cost, *path) for path in paths]
    needed += [
        number_at(record.metrics, *p)
        for p in (("validation", "nll"), ("validation", "perplexity"), ("training", "train_runtime"))
    ]
    row = {"strategy", "sparsity", "seed", "status"} <= record.metrics.keys()
    return row and all(finite(value) is not None for value in needed)


def _failure(row: Mapping[str, Any]) -> str:
    return f"{row.get('name')}: exit status {row.get('exit_status')}: {str(row.get('error'))[:400]}"


def _notes(records: Sequence[Record]) -> list[str]:
    found = [f"{record.name}: {note}" for record in records for note in record.notes if "journal" not in note]
    return found if len(found) <= 8 else [*found[:8], f"and {len(found) - 8} more notes"]
