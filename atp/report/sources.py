"""What a user names as RUN -> records: a run's folder, a comparison's folder or rows, or the JSON of `atp eval`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atp.errors import DataError
from atp.report.record import Record, read_run
from atp.report.values import mapping_at, text_at

ROWS = "rows.jsonl"
_PERPLEXITY = ("perplexity", "nll", "nll_stderr", "worst_row_nll", "tokens")


def read_sources(paths: Sequence[Path]) -> tuple[list[Record], list[Mapping[str, Any]]]:
    """All runs that are named, each under a name of its own, and the rows of those that failed.

    Raises:
        DataError: naming the path that holds no run.
    """
    records: list[Record] = []
    failed: list[Mapping[str, Any]] = []
    for path in paths:
        if (rows := path / ROWS if path.is_dir() else path).name.endswith(".jsonl") and rows.is_file():
            found, bad = _rows(rows)
            failed += bad
        else:
            found = _evaluated(path) if path.is_file() else [read_run(path)]
        records += [replace(record, source=path) for record in found]
    return _named_apart(records, paths), failed


def _rows(path: Path) -> tuple[list[Record], list[Mapping[str, Any]]]:
    """The rows of `atp compare`, the last of each name."""
    rows: dict[str, Mapping[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _parsed(line)
        if isinstance(row, dict) and (name := text_at(row, "name")):
            rows[name] = row
    done = [row for row in rows.values() if row.get("status") == "ok"]
    if not done:
        raise DataError(f"{path}: holds no finished run: run atp compare to its end first")
    when = path.stat().st_mtime
    records = [
        Record(str(row["name"]), row, mapping_at(row, "recipe"), when=when, comparison=str(path)) for row in done
    ]
    return records, [row for row in rows.values() if row.get("status") == "failed"]


def _evaluated(path: Path) -> list[Record]:
    """The models that `atp eval --json` measured."""
    results = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    models = results.get("models") if isinstance(results, dict) else None
    found = [each for each in models if isinstance(each, dict)] if isinstance(models, list) else []
    if not found:
        raise DataError(f"{path}: is no run: give a run's folder, a comparison's folder, or a file of atp eval --json")
    shared = {"versions": mapping_at(results, "versions")}
    return [
        Record(
            text_at(each, "model") or path.stem,
            shared
            | {
                "model": text_at(each, "model"),
                "tuned": each,
                "validation": {key: each[key] for key in _PERPLEXITY if key in each},
                "tasks": mapping_at(each, "tasks"),
            },
            when=path.stat().st_mtime,
        )
        for each in found
    ]


def _named_apart(records: Sequence[Record], paths: Iterable[Path]) -> list[Record]:
    """Runs of the same name get their place in front, or a number."""
    names = [record.name for record in records]
    if len(records) == len(list(paths := list(paths))):
        names = [
            "/".join(path.resolve().parts[-2:]) if names.count(name) > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]
    return [
        replace(record, name=f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name)
        for i, (record, name) in enumerate(zip(records, names, strict=True))
    ]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
