"""What recovery did to a pruned model: whether it was kept, and quality before and after."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atp.report.page.block_errors import CALIBRATION, HELD_OUT, TEXTS, TIMES, Block, error_charts, read_blocks
from atp.report.page.parts import Section, Table, Value
from atp.report.page.texts import NOTHING, compared, moved, short
from atp.report.values import at, flag, lower_is_better, mapping_at, number_at, text_at

_MEASURES = {"perplexity": "perplexity", "nll": "nll, nats per token", "kl": "KL from the teacher, nats per token"}
_CHARACTERS, _FOLDED = 120, 20_000
"""How much is shown at most, so that no file makes a page too large."""


def recovery_section(recovery: Mapping[str, Any]) -> Section:
    """What `recovery.json` holds; empty where there is none."""
    section = Section("recovery", "Recovery")
    if not recovery:
        return section
    blocks, quality, made = read_blocks(recovery), _quality(recovery), _made(recovery)
    return Section(
        section.anchor,
        section.title,
        " ".join(text for text in (_sentence(recovery, blocks), _took(recovery)) if text),
        tables=(quality,) if quality else (),
        charts=error_charts(blocks),
        folded=(("How it was recovered (recovery.json)", made),) if made else (),
    )


def recoveries_section(recoveries: Mapping[str, Mapping[str, Any]]) -> Section:
    """A row a run that was recovered, by its name; empty where none was."""
    columns = ("run", "method", "result", "blocks kept", "held-out perplexity before", "after")
    rows = tuple((Value(name), *_at_a_glance(recovery)) for name, recovery in recoveries.items() if recovery)
    tables = (Table("What recovery made of pruned models", columns, rows, wide=True),) if rows else ()
    intro = "All other figures of this page are of the models as they were before it." if rows else ""
    return Section("recovery", "Recovery", intro, tables=tables)


def _at_a_glance(recovery: Mapping[str, Any]) -> tuple[Value, ...]:
    before, after = (number_at(recovery, "overall", time, HELD_OUT, "perplexity") for time in TIMES)
    return (
        Value(_cut(text_at(recovery, "method")) or NOTHING),
        Value(_result(recovery) or NOTHING),
        Value(_blocks_kept(read_blocks(recovery)) or NOTHING),
        Value(short(before)),
        compared(short(after), after, before, True),
    )


def _sentence(recovery: Mapping[str, Any], blocks: Sequence[Block]) -> str:
    """What was done, and whether it was kept."""
    method, student, teacher = (_cut(text_at(recovery, key)) for key in ("method", "student", "teacher"))
    words = [f"Recovery by {method}" if method else "Recovery"]
    words += [f"of {student}"] if student else []
    words += [f"with {teacher} as its teacher"] if teacher else []
    words += [f"on {text}"] if (text := _text_used(mapping_at(recovery, "data", CALIBRATION))) else []
    result, of_blocks = _result(recovery), _blocks_kept(blocks)
    outcome = [f"the result was {result}"] if result else []
    outcome += [f"block by block, {of_blocks} were kept"] if of_blocks else []
    return f"{' '.join(words)}: {'; '.join(outcome) or 'whether it was kept is not recorded'}."


def _result(recovery: Mapping[str, Any]) -> str:
    kept = flag(at(recovery, "overall", "kept"))
    return "" if kept is None else "kept" if kept else "rolled back"


def _blocks_kept(blocks: Sequence[Block]) -> str:
    told = [block.kept for block in blocks if block.kept is not None]
    return f"{sum(told)} of {len(told)}" if told else ""


def _text_used(data: Mapping[str, Any]) -> str:
    """`16,384 tokens of a.jsonl`."""
    given, tokens = at(data, "sources"), number_at(data, "tokens")
    sources = _cut(", ".join(name for name in given if isinstance(name, str)) if isinstance(given, list) else None)
    count = "" if tokens is None else f"{tokens:,.0f} tokens"
    return f"{count} of {sources}" if count and sources else count or sources


def _took(recovery: Mapping[str, Any]) -> str:
    seconds, memory = number_at(recovery, "seconds"), number_at(recovery, "peak_memory_mib")
    parts = [] if seconds is None else [f"{short(seconds)} s"]
    parts += [] if memory is None else [f"{short(memory)} MiB at its peak"]
    return f"It took {' and '.join(parts)}." if parts else ""


def _quality(recovery: Mapping[str, Any]) -> Table | None:
    """A row a text and measure, after against before; `None` where nothing was measured."""
    rows = []
    for text, title in TEXTS.items():
        for measure, words in _MEASURES.items():
            before, after = (number_at(recovery, "overall", time, text, measure) for time in TIMES)
            if before is not None or after is not None:
                rows.append(
                    (Value(f"{title}, {words}"), Value(short(before)), compared(short(after), after, before, True))
                )
    rows += _scores(recovery)
    if not rows:
        return None
    undone = flag(at(recovery, "overall", "kept")) is False
    note = "Rolled back: the model is as it was before." if undone else ""
    return Table("Before and after recovery", ("", *TIMES), tuple(rows), note)


def _scores(recovery: Mapping[str, Any]) -> list[tuple[Value, Value, Value]]:
    """A row a task, of those that were scored before and after."""
    rows: list[tuple[Value, Value, Value]] = []
    for task in mapping_at(recovery, "tasks", "before"):
        before, after = (number_at(recovery, "tasks", time, task, "value") for time in TIMES)
        metric = text_at(recovery, "tasks", "before", task, "metric") or "score"
        if before is not None:
            shown = moved(short(after, 3), after, before, lower_is_better(metric))
            rows.append((Value(_cut(f"{task}, {metric}")), Value(short(before, 3)), shown))
    return rows


def _made(recovery: Mapping[str, Any]) -> str:
    """All but what was measured, as it stands in the file."""
    told = {key: value for key, value in recovery.items() if key not in ("blocks", "overall", "tasks")}
    try:
        text = json.dumps(told, indent=2) if told else ""
    except RecursionError:
        return ""
    return text if len(text) <= _FOLDED else f"{text[:_FOLDED]}\n... cut here: the rest is in recovery.json"


def _cut(text: str | None) -> str:
    return "" if text is None else text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} ..."
