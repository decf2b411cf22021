"""The sections of one run's page, from the question most asked to the one least asked."""

import math

from atp.report.page.about import about_section, alerts_section, samples_section
from atp.report.page.headline import headline, models_of, tiles
from atp.report.page.parts import Page, Section
from atp.report.page.places import places_section
from atp.report.page.recovery import recovery_section
from atp.report.page.tasks import tasks_section
from atp.report.page.texts import share, short
from atp.report.page.training import training_section
from atp.report.page.widths import widths_section
from atp.report.record import Record
from atp.report.values import number_at, text_at


def run_page(record: Record) -> Page:
    """What one run shows."""
    models, table = models_of(record), headline(record)
    sections = (
        Section("headline", "Headline", tables=(table,) if table else (), tiles=tiles(table)),
        alerts_section(record.journal),
        tasks_section([(model.name, dict(model.scores)) for model in models if model.scores]),
        recovery_section(record.recovery),
        widths_section(record.journal),
        training_section(record.journal),
        places_section([(model.name, model.cost) for model in models if model.cost]),
        samples_section(record),
        about_section(record),
    )
    shown = tuple(section for section in sections if not section.is_empty)
    return Page(record.name, _summary(record), shown, (*_not_finite(record), *record.notes))


def _not_finite(record: Record) -> list[str]:
    """What a broken model shows first."""
    found = []
    if record.perplexity is not None and not math.isfinite(record.perplexity):
        found.append(f"The model that came out is broken: its perplexity is {short(record.perplexity)}.")
    if steps := record.journal.not_finite("loss"):
        found.append(f"The training loss was not finite at {len(steps)} logged step(s), first at step {steps[0]:,}.")
    return found


def _summary(record: Record) -> str:
    """One sentence under the title."""
    model = text_at(record.metrics, "model") or text_at(record.recipe, "model", "name_or_path")
    parts = [part for part in (model, record.strategy) if part]
    reached = number_at(record.metrics, "pruning", "sparsity")
    if record.sparsity:
        asked = f"asked to remove {share(record.sparsity)} of the prunable parameters"
        parts.append(asked if reached is None else f"{asked}, removed {share(reached)}")
    if not record.finished:
        total, last = record.journal.run.get("total_steps"), record.journal.last_step
        parts.append(
            "not finished" if last is None else f"not finished: step {last:,} of {short(number_at({'n': total}, 'n'))}"
        )
    return " · ".join(parts)
