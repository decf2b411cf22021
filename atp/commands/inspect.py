"""`atp inspect MODEL`: blocks, groups, parameters per group, and the widths that an equally shared sparsity leaves."""

import argparse
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from atp.commands.models import load_shell
from atp.commands.output import print_table
from atp.config import SPACES, ATPConfig
from atp.evaluation import count_parameters
from atp.export.layout import empty_model
from atp.files import write_json
from atp.structure.budget import budget_note, project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.space import GroupSet, Space


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub name, folder, .gguf file, or a name such as llama-3-8b; no weights are loaded",
    )
    parser.add_argument("--gguf-file", help="GGUF file inside MODEL")
    parser.add_argument("--sparsity", type=float, default=0.4, help="share of prunable parameters (default 0.4)")
    parser.add_argument("--space", default="width", help=f"one of {', '.join(SPACES)}, or e.g. width+depth")
    parser.add_argument("--uniform", action="store_true", help="the same widths in every block")
    parser.add_argument("--round-to", type=int, help="kept widths are multiples of this")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print two tables: the model, and its groups."""
    config = ATPConfig(
        sparsity=arguments.sparsity,
        space=arguments.space,
        uniform=arguments.uniform,
        round_to=arguments.round_to,
    )
    model = load_shell(arguments.model, arguments.gguf_file)
    structure = discover(model)
    space = build_space(structure, config.space, config.uniform, config.round_to)
    masks = project(equal_scores(space), space, config.sparsity)
    total, achieved = count_parameters(model), space.sparsity(masks)
    left = count_parameters(empty_model(model, space, masks))
    results = {
        "model": arguments.model,
        "model_type": structure.model_type,
        "hidden_size": structure.hidden_size,
        "blocks": len(structure.blocks),
        "parameters": total,
        "prunable_parameters": space.prunable_parameters,
        "space": space.name,
        "sparsity_asked": config.sparsity,
        "sparsity_achieved": achieved,
        "parameters_removed": total - left,
        "parameters_left": left,
        "share_of_all_removed": 1.0 - left / total,
        "note": budget_note(space, masks, config.sparsity),
    }
    groups = _groups(space, masks)
    print_table(arguments.model, ("", "value"), [(k.replace("_", " "), v) for k, v in results.items() if v is not None])
    print_table(
        f"space {space.name}, what is kept when the sparsity is shared equally",
        ("blocks", "group kind", "groups", "parameters each", "kept"),
        [(g.blocks, g.kind, g.size, g.parameters, g.kept) for g in groups],
    )
    if arguments.json:
        write_json(arguments.json, results | {"groups": [vars(g) for g in groups]})


def equal_scores(space: Space) -> dict[str, Tensor]:
    """Scores that make every group set keep the same share: a group's score is its quantile in its set."""
    return {s.name: 1.0 - (torch.arange(s.size) + 0.5) / s.size for s in space.sets}


@dataclass(frozen=True)
class _Groups:
    """A run of blocks whose sets of one kind are alike. `parameters`: removed with one group of the full model."""

    blocks: str
    kind: str
    size: int
    parameters: int
    kept: int


def _groups(space: Space, masks: dict[str, Tensor]) -> list[_Groups]:
    rows: list[tuple[GroupSet, int, int]] = [
        (s, round(each), int(masks[s.name].sum()))
        for s, each in zip(space.sets, space.group_parameters.tolist(), strict=True)
    ]
    found = []
    for kind in space.kinds:
        members = [row for row in rows if row[0].kind == kind]
        for (size, each, kept), alike in groupby(members, key=lambda row: (row[0].size, row[1], row[2])):
            blocks = [row[0].block for row in alike]
            first, last = blocks[0], blocks[-1]
            name = "all" if first is None else str(first) if first == last else f"{first}-{last}"
            found.append(_Groups(name, kind, size, each, kept))
    return found
