"""What a run was: its warnings, samples, configuration, versions, data and command."""

import shlex
from collections.abc import Mapping
from typing import Any

from atp.report.journal import Journal
from atp.report.page.parts import Sample, Section, Table, plain_table
from atp.report.page.texts import NOTHING, short
from atp.report.record import Record
from atp.report.values import at, finite, mapping_at, text_at

_ALERTS, _SAMPLES, _CHARACTERS, _RECIPE = 60, 12, 2_000, 40_000
"""How much of each is shown at most, so that no run makes a page too large."""

_MODELS = (("reference", "reference"), ("base", "dense (base)"), ("result", "this run's model"))


def alerts_section(journal: Journal) -> Section:
    """The warnings that the run gave."""
    items = []
    for step, alert in journal.alerts[:_ALERTS]:
        value = at(alert, "value")
        name, message = _text(at(alert, "name") or "alert"), _text(at(alert, "message") or "")
        items.append(
            f"Step {step:,}: {name}: {message}" + ("" if finite(value) is None else f" (value {short(value)})")
        )
    if len(journal.alerts) > _ALERTS:
        items.append(f"and {len(journal.alerts) - _ALERTS:,} more")
    return Section("alerts", "Alerts", items=tuple(items))


def samples_section(record: Record) -> Section:
    """What the models wrote to the same prompts."""
    given = at(record.metrics, "samples")
    found = [each for each in given if isinstance(each, Mapping)] if isinstance(given, list) else []
    samples = []
    for each in found[:_SAMPLES]:
        texts = [(title, _text(each[key])) for key, title in _MODELS if each.get(key) is not None]
        samples.append(Sample(_text(each.get("prompt") or ""), tuple(texts)))
    left = len(found) - _SAMPLES
    intro = f"The first {_SAMPLES} of {len(found)}." if left > 0 else ""
    return Section("samples", "Sample generations", intro, samples=tuple(samples))


def about_section(record: Record) -> Section:
    """Everything that another needs to do the run again."""
    tables = (data_table(record), versions_table(record))
    text = record.recipe_text
    if text and len(text) > _RECIPE:
        text = text[:_RECIPE] + "\n# cut here: the rest is in recipe.yaml"
    return Section(
        "about",
        "How this run was made",
        tables=tuple(table for table in tables if table),
        code=command(record) or "",
        folded=(("Configuration (recipe.yaml)", text),) if text else (),
    )


def command(record: Record) -> str | None:
    """The command that makes the run again."""
    words = at(record.metrics, "command")
    if isinstance(words, list) and words:
        return shlex.join(str(word) for word in words)
    return text_at(record.metrics, "command")


def data_table(record: Record) -> Table | None:
    """The files of each split, their rows and fingerprints, as far as the run tells."""
    data = mapping_at(record.metrics, "data") or mapping_at(record.recipe, "data")
    names = {split: at(data, split) for split in ("train", "validation")}
    fingerprints, counts = (
        mapping_at(record.metrics, "data", "fingerprints"),
        mapping_at(record.metrics, "data", "rows"),
    )
    rows = []
    for split in dict.fromkeys([*(s for s, files in names.items() if files), *fingerprints, *counts]):
        files = names.get(split) or NOTHING
        rows.append(
            [
                split,
                ", ".join(map(str, files)) if isinstance(files, list) else str(files),
                short(finite(counts.get(split))),
                str(fingerprints.get(split) or "not recorded")[:16],
            ]
        )
    return plain_table("Data", ("split", "files", "rows", "fingerprint"), rows, prose=True, wide=True) if rows else None


def versions_table(record: Record) -> Table | None:
    """Packages."""
    versions = mapping_at(record.metrics, "versions")
    rows = [[str(name), _text(version)] for name, version in versions.items()]
    return plain_table("Versions", ("package", "version"), rows[:40], prose=True) if rows else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ... ({len(text):,} characters)"
