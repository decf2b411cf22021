"""`atp generate MODEL OUT.jsonl`: calibration rows that the model writes itself, mixed with real ones where asked.

Beside OUT.jsonl, OUT.meta.json says how it was made. The same command gives the same two files on one machine.
"""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.commands.models import computes_in_bf16, to_best_device
from atp.commands.output import print_table
from atp.commands.versions import versions_of
from atp.data import Row, fingerprint, read_rows
from atp.errors import CheckpointError, ConfigError
from atp.files import check_place, file_written_beside, write_json
from atp.loading import adapter_folder, base_of, load_dense, tokenizer_of
from atp.models import load_model, load_tokenizer
from atp.recipe import DTYPES
from atp.recovery.generation import Mix, Mixed, WritingSettings, language_test, mixed_rows

logger = logging.getLogger(__name__)

_EPILOG = """\
A text begins with a random token of the vocabulary, goes on with a few greedy
tokens, and is then sampled; or it goes on from --prompts. Dropped, and written
anew, are texts that are broken, short, repetitive, in another language, near
duplicates (of each other, of the prompts' or real rows), or overlap rows of
--disjoint-from by more than half of their runs of 13 words.

Each line has `source` (generated or real), and `text`, or `prompt` and
`completion` where it has a prompt. Give OUT.jsonl as data.calibration of a
recipe, with --disjoint-from for every file that the recipe measures on.
"""

_ATTEMPTS = 10
"""Texts written at most for each that is asked for."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    default = WritingSettings()
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, folder, .gguf file, or a run's output folder: its dense tuned model"
    )
    parser.add_argument("out", metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--rows", type=int, default=256, help="in OUT.jsonl (default 256)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of all that is drawn (default 0)")
    writing = parser.add_argument_group("writing")
    writing.add_argument("--prompts", metavar="FILE.jsonl", help="begin with these rows' prompts, or first 8 words")
    writing.add_argument(
        "--tokens", type=int, default=default.tokens, help="that the model adds to a start, at most (default 256)"
    )
    writing.add_argument(
        "--greedy-tokens", type=int, metavar="N", help="of them the first, not sampled (default 4; with --prompts 0)"
    )
    writing.add_argument("--temperature", type=float, default=default.temperature, help="default 1.0")
    writing.add_argument("--top-p", type=float, default=default.top_p, help="default 0.95; 1.0 samples from all tokens")
    writing.add_argument(
        "--language",
        metavar="CODE,...",
        help="keep texts in these, e.g. en,de, or none (default en, which needs atp[language]; with --prompts none)",
    )
    writing.add_argument(
        "--max-attempts", type=int, metavar="N", help="texts written before it gives up (default: 10 for each row)"
    )
    mixing = parser.add_argument_group("mixing")
    mixing.add_argument("--real", metavar="FILE.jsonl", help="draw the other rows from here")
    mixing.add_argument("--share", type=float, help="of rows that the model writes (default 1; with --real 0.5)")
    mixing.add_argument(
        "--disjoint-from", metavar="FILE.jsonl", action="append", default=[], help="keep nothing of these; repeatable"
    )
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="texts at once (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--base", help="base model of a run, where the run does not say or it has moved")
    parser.add_argument("--gguf-file", help="GGUF file inside MODEL, or inside --base")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check everything, load the model, write, and print what was kept and what dropped."""
    out = Path(arguments.out)
    _check_out(out, arguments)
    mix = _mix(arguments)
    settings = _settings(arguments, mix)
    language_test(settings.languages)
    model, tokenizer = _load(arguments)
    started = time.perf_counter()
    mixed = mixed_rows(model, tokenizer, mix, settings)
    seconds = time.perf_counter() - started
    about = _about(arguments, mix, settings, mixed)
    _write(out, mixed, about)
    print_table(str(out), ("", "value"), _table(about, seconds))
    if arguments.json:
        write_json(arguments.json, {"out": str(out), **about, "seconds": seconds})


def _check_out(out: Path, arguments: argparse.Namespace) -> None:
    if out.suffix != ".jsonl" or out.is_dir():
        raise ConfigError(f"{out}: rows are written to one file: give a name that ends in .jsonl")
    if out.exists() and not arguments.overwrite:
        raise CheckpointError(f"{out} exists: choose another name or give --overwrite")
    for read in (arguments.prompts, arguments.real, *arguments.disjoint_from):
        if read and Path(read).resolve() == out.resolve():
            raise ConfigError(f"{out} is read, too, and would be replaced: choose another name")
    for place in (out.absolute(), out.resolve()):  # what says how, and the rows themselves
        check_place(place.parent)


def _mix(arguments: argparse.Namespace) -> Mix:
    share = arguments.share if arguments.share is not None else 0.5 if arguments.real else 1.0
    if share != 1 and not arguments.real:
        raise ConfigError(f"--share {share} leaves rows that are not written: give --real FILE.jsonl to draw them from")
    mix = Mix(
        arguments.rows,
        share,
        read_rows(arguments.prompts) if arguments.prompts else None,
        read_rows(arguments.real) if arguments.real else (),
        read_rows(arguments.disjoint_from) if arguments.disjoint_from else (),
    )
    _ = mix.usable  # where sources are too small, that is said before a model is loaded
    return mix


def _settings(arguments: argparse.Namespace, mix: Mix) -> WritingSettings:
    prompted = mix.prompts is not None
    language = arguments.language or ("none" if prompted else "en")
    greedy = arguments.greedy_tokens
    attempts = arguments.max_attempts
    return WritingSettings(
        tokens=arguments.tokens,
        greedy_tokens=greedy if greedy is not None else 0 if prompted else WritingSettings.greedy_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        languages=() if language == "none" else tuple(code.strip() for code in language.split(",")),
        batch_size=arguments.batch_size,
        max_attempts=attempts if attempts is not None else max(1, _ATTEMPTS * mix.written),
        seed=arguments.seed,
    )


def _load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, gguf_file = arguments.model, arguments.gguf_file
    adapter = adapter_folder(Path(name))
    if adapter is None and arguments.base:
        raise ConfigError(f"--base is for runs, and {name} is no run's folder: leave it out")
    if adapter is None:
        tokenizer = load_tokenizer(name, gguf_file)
        model = to_best_device(load_model(name, gguf_file, arguments.dtype))
    else:
        base = base_of(adapter, arguments.base, gguf_file)
        tokenizer = tokenizer_of(adapter, base)
        model = load_dense(name, base=arguments.base, gguf_file=gguf_file)
        model = model if base.bits else _in_dtype(to_best_device(model), arguments.dtype)
    if model.dtype == torch.bfloat16 and not computes_in_bf16():
        logger.warning("atp: this CPU has no bfloat16 arithmetic: --dtype float32 is several times faster here")
    return model, tokenizer


def _in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Cast once merged: its recipe's dtype is what the adapter was tuned on."""
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def _about(arguments: argparse.Namespace, mix: Mix, settings: WritingSettings, mixed: Mixed) -> dict[str, Any]:
    """How the rows were made; nothing in it differs when they are made again."""
    sources = {"prompts": mix.prompts, "real": mix.real, "disjoint_from": mix.held_out}
    generated = len(mixed.written.rows)
    return {
        "model": arguments.model,
        "base": arguments.base,
        "gguf_file": arguments.gguf_file,
        "dtype": arguments.dtype,
        "begins_with": "a random token" if mix.prompts is None else "prompts",
        "settings": {"rows": mix.rows, "share": mix.share, **dataclasses.asdict(settings)},
        "files": {"prompts": arguments.prompts, "real": arguments.real, "disjoint_from": arguments.disjoint_from},
        "rows": len(mixed.rows),
        "generated": generated,
        "real": len(mixed.rows) - generated,
        "attempts": mixed.written.attempts,
        "dropped": mixed.written.dropped,
        "real_dropped": mixed.real_dropped,
        "prompts_dropped": mixed.prompts_dropped,
        "fingerprints": {name: fingerprint(rows) for name, rows in sources.items() if rows}
        | {"rows": fingerprint(row for row, _ in mixed.rows)},
        "versions": versions_of("atp", "torch", "transformers", "py3langid"),
    }


def _write(out: Path, mixed: Mixed, about: dict[str, Any]) -> None:
    """Both files or none, but for a kill between two renames: then what is said of the rows is there without them."""
    lines = "".join(json.dumps(_record(row, written), ensure_ascii=False) + "\n" for row, written in mixed.rows)
    with file_written_beside(out) as rows, file_written_beside(out.with_suffix(".meta.json")) as meta:
        rows.write_text(lines, encoding="utf-8")
        meta.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _record(row: Row, written: bool) -> dict[str, str]:
    source = {"source": "generated" if written else "real"}
    text = {"prompt": row.prompt, "completion": row.completion} if row.prompt else {"text": row.completion}
    return text | source


def _table(about: dict[str, Any], seconds: float) -> Sequence[tuple[str, object]]:
    lines: list[tuple[str, object]] = [(name, about[name]) for name in ("rows", "generated", "real", "attempts")]
    lines += [(f"dropped: {name}", count) for name, count in about["dropped"].items() if count]
    lines += [(f"real rows dropped: {name}", count) for name, count in about["real_dropped"].items() if count]
    if about["prompts_dropped"]:
        lines.append(("prompts dropped: held_out", about["prompts_dropped"]))
    return [*lines, ("seconds", seconds)]
