"""`atp rotate MODEL OUT`: the same model, its value dimensions in the order of what they are worth on given text."""

import argparse
from pathlib import Path

import torch

from atp.commands.models import to_best_device
from atp.commands.output import print_table
from atp.data import collator, make_windows, read_rows
from atp.errors import CheckpointError, ConfigError
from atp.export.card import write_rotated_card
from atp.files import check_place, keep_apart, write_json, written_beside
from atp.models import load_model, load_tokenizer
from atp.recipe import DTYPES
from atp.rotation import rotate_values
from atp.subset import evenly_spread

_EPILOG = """\
OUT is a plain Hugging Face folder that computes what MODEL does, up to rounding:
the values of every KV head are rotated, and attention's output projection back.
Give it as model.name_or_path of a recipe, or load it in a script, and prune it
in --atp.space values; pruned/ needs neither MODEL nor OUT afterwards.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="hub name, folder, or .gguf file")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", required=True, help="text of the domain, as data.train of a recipe"
    )
    parser.add_argument("--windows", type=int, default=32, help="of text that are looked at (default 32)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in and to write")
    parser.add_argument("--gguf-file", help="GGUF file inside MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the place, load, rotate, write, and print by how much logits have moved."""
    out = Path(arguments.out)
    _check(out, arguments)
    rows = read_rows(arguments.data)
    tokenizer = load_tokenizer(arguments.model, arguments.gguf_file)
    windows = make_windows(rows, tokenizer, arguments.max_length)
    model = to_best_device(load_model(arguments.model, arguments.gguf_file, arguments.dtype))
    collate = collator(tokenizer)
    chosen = evenly_spread(len(windows), arguments.windows)
    moved = rotate_values(model, [collate([windows[index]]) for index in chosen])
    with written_beside(out) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_rotated_card(beside, arguments.model, arguments.gguf_file, moved)
    results = {"out": str(out), "windows": len(chosen), "tokens": len(chosen) * arguments.max_length, "moved": moved}
    told = {"windows looked at": len(chosen), "logits have moved by": f"{moved:.1e} of their size"}
    print_table(str(out), ("", "value"), list(told.items()))
    if arguments.json:
        write_json(
            arguments.json, results | {"dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__}
        )


def _check(out: Path, arguments: argparse.Namespace) -> None:
    for option, least in (("windows", 1), ("max_length", 2)):
        if (given := getattr(arguments, option)) < least:
            raise ConfigError(f"--{option.replace('_', '-')} {given} is too few: give {least} or more")
    if out.exists() and not arguments.overwrite:
        raise CheckpointError(f"{out} exists: choose another name or give --overwrite")
    keep_apart(out, Path(arguments.model), *map(Path, arguments.data))
    check_place(out.parent)
