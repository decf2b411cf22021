"""The sections of a page of several runs, each measured against a baseline."""

from collections.abc import Mapping, Sequence
from typing import Any

from atp.errors import ConfigError
from atp.report.answers import answers
from atp.report.page.fronts import front_charts
from atp.report.page.parts import Page, Section, Table, Value, plain_table
from atp.report.page.regressions import PERPLEXITY_TOLERANCE, data_warnings, regressions
from atp.report.page.tasks import tasks_section
from atp.report.page.texts import NOTHING, compared, lower_is_better, megabytes, moved, share, short
from atp.report.page.variants import Variant, group
from atp.report.record import Record
from atp.report.summary import Cell, Spread, summarise
from atp.report.tables import spread
from atp.report.values import finite, number_at

_SETTINGS, _SHOWN = 60, 80
_MISSING = "<missing>"


def comparison_page(
    records: Sequence[Record], baseline: str | None, failed: Sequence[Mapping[str, Any]]
) -> tuple[Page, tuple[str, ...]]:
    """The page, and what is worse than the baseline.

    Raises:
        ConfigError: where no run is called `baseline`.
    """
    variants = group(records)
    base = _baseline(variants, baseline)
    worse = regressions(variants, base)
    sections = (
        Section("headline", "Runs side by side", _intro(base), tables=(headline(variants, base),)),
        _regressions_section(worse, variants, base),
        Section("fronts", "Quality against size and speed", charts=tuple(front_charts(variants, base))),
        tasks_section([(variant.name, dict(variant.scores)) for variant in variants if variant.scores]),
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
        *("peak memory of training, MiB", "perplexity", *(f"{task}, {metric}" for task, metric in tasks)),
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
    def value(found: float | None, start: float | None, text: str) -> Value:
        return compared(text, found, None if variant is base else start, True)

    memory = [finite(number_at(each.first.metrics, "training", "peak_memory_mib")) for each in (variant, base)]
    size = [each.cost("bytes") for each in (variant, base)]
    paths = (("prefill", "latency_ms"), ("decode", "latency_ms_per_token"))
    return [
        value(variant.parameters, base.parameters, short(variant.parameters)),
        value(*size, megabytes(size[0])),
        *(value(variant.cost(*path), base.cost(*path), short(variant.cost(*path))) for path in paths),
        value(*memory, short(memory[0])),
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
    return moved(now.text, now.value, before.value if comparable and before else None, lower_is_better(metric))


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
        f"Differences are from {base.name}, the baseline: \u25b2 is better, \u25bc is worse. Perplexity: mean and "
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
    """A row a setting that is not the same in all, a column a run; with many runs, a row a setting and value."""
    differing = differences({variant.name: variant.first for variant in variants if variant.first.recipe})
    rows = [
        [setting, str(value)[:120], ", ".join(names)]
        for setting, values in list(differing.items())[:_SETTINGS]
        for value, names in values.items()
    ]
    return (plain_table("Settings that differ", ("setting", "value", "runs"), rows),) if rows else ()


def differences(records: Mapping[str, Record]) -> dict[str, dict[str, list[str]]]:
    """Setting -> value -> names of the runs that have it, for settings that are not the same in all."""
    settings = {name: record.settings for name, record in records.items()}
    found: dict[str, dict[str, list[str]]] = {}
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        values: dict[str, list[str]] = {}
        for name, each in settings.items():
            values.setdefault(str(each.get(key, _MISSING)), []).append(name)
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
