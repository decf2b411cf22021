"""`atp eval MODEL...`: token-weighted perplexity and size of any causal LMs on the same rows."""

import argparse
import dataclasses
from typing import Any

from atp.commands.models import to_best_device
from atp.commands.output import print_table, write_json
from atp.data import make_windows, read_rows
from atp.errors import ConfigError
from atp.evaluation import count_parameters, perplexity
from atp.models import load_model, load_tokenizer
from atp.recipe import DTYPES
from atp.report import Spread, spread


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("eval", help="held-out perplexity of one or more models")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="hub name, folder, or .gguf file")
    parser.add_argument("--data", required=True, metavar="FILE", action="append", help="JSONL file or hub data set")
    parser.add_argument("--split", default="test", help="split of a hub data set (default test)")
    parser.add_argument("--prompt", help="template over the columns, e.g. 'Question: {question}'")
    parser.add_argument("--completion", help="template over the columns, e.g. ' {answer}'")
    parser.add_argument("--completion-only", action="store_true", help="count the tokens of completions only")
    parser.add_argument("--packing", action="store_true", help="windows of exactly --max-length tokens")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row or window (default 256)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--gguf-file", help="GGUF file inside every MODEL that is not itself a .gguf path")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure the models one after the other and print one table."""
    for name, least in (("max_length", 2), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be an integer >= {least}")
    rows = read_rows(arguments.data, arguments.split, arguments.prompt, arguments.completion)
    results = [_measure(name, rows, arguments) for name in arguments.models]
    print_table(
        f"{', '.join(arguments.data)}: {len(rows)} rows",
        ("model", "parameters", "perplexity", "nll", "worst row's nll", "tokens counted", "tokens/s"),
        [_texts(result) for result in results],
    )
    if arguments.json:
        write_json(arguments.json, {"data": arguments.data, "rows": len(rows), "models": results})


def _texts(result: dict[str, Any]) -> tuple[object, ...]:
    return (
        *(result[key] for key in ("model", "parameters", "perplexity")),
        spread(Spread(result["nll"], result["nll_stderr"]), digits=3),
        *(result[key] for key in ("worst_row_nll", "tokens", "tokens_per_second")),
    )


def _measure(name: str, rows: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    gguf_file = None if name.endswith(".gguf") else arguments.gguf_file
    tokenizer = load_tokenizer(name, gguf_file)
    windows = make_windows(rows, tokenizer, arguments.max_length, arguments.packing, arguments.completion_only)
    model = to_best_device(load_model(name, gguf_file, arguments.dtype))
    measured = dataclasses.asdict(perplexity(model, windows, arguments.batch_size))
    return {"model": name, "parameters": count_parameters(model), **measured}
