"""One export per family and space, made once and shared by all behaviours."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atp.export import export, load
from atp.layers import attach, attachment_of
from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.space import Space
from tests import families

SPACES = {
    "width": ("width", False),
    "uniform": ("width", True),
    "disp": ("disp", False),
    "values": ("values", False),
    "hidden": ("hidden", False),
    "depth": ("depth", False),
    "blocks": ("depth", True),
    "all": ("width+hidden+depth", False),
    "plainest": ("width+hidden+depth", True),
}
LAYER_NORMS = ("starcoder2", "stablelm", "gpt_neox", "gpt_neox_serial")
"""Families whose residual stream cannot be cut."""
PACKED = ("phi3", "gpt_neox", "gpt_neox_serial")
"""Families whose values are packed with queries and keys."""
UNLIKE = ("llama", "llama_tied", "qwen2", "gemma3", "phi3", "olmo2", "smollm3", "gpt_neox")
"""Families that differ in what `hidden` and `depth` touch: norms, scales, packed projections, settings per block."""
CASES = [
    *((f, s) for f in families.FAMILIES for s in ("width", "uniform", "disp")),
    *((f, "values") for f in families.FAMILIES if f not in PACKED),
    *((f, s) for f in UNLIKE for s in ("depth", "blocks")),
    *((f, s) for f in UNLIKE for s in ("hidden", "all", "plainest") if f not in LAYER_NORMS),
]
SPARSITY = 0.4
FOLDERS = TemporaryDirectory(prefix="atp-test-")
"""Removed when the process ends."""


@dataclass(frozen=True)
class Case:
    """A masked LoRA model's logits and generated tokens, and the same model exported and loaded."""

    space: Space
    masks: dict[str, Tensor]
    logits: Tensor
    folder: Path
    loaded: PreTrainedModel


def random_masks(space: Space, sparsity: float = SPARSITY, seed: int = 0) -> dict[str, Tensor]:
    """A decision on budget from random scores."""
    generator = torch.Generator().manual_seed(seed)
    return project({s.name: torch.rand(s.size, generator=generator) for s in space.sets}, space, sparsity)


def masked(model: torch.nn.Module, space_name: str, sparsity: float = SPARSITY) -> torch.nn.Module:
    """`model` attached to the space under random masks."""
    name, uniform = SPACES[space_name]
    space = build_space(discover(model), name, uniform=uniform)
    attach(model, space).set_masks(random_masks(space, sparsity))
    return model


@cache
def exported(family: str, space_name: str, sparsity: float = SPARSITY) -> Case:
    """Build, tune at random, mask, export and load."""
    model = masked(families.with_lora(families.build(family)), space_name, sparsity)
    attachment = attachment_of(model)
    expected = families.logits(model)
    folder = export(model, Path(FOLDERS.name) / f"{family}-{sparsity}" / space_name)
    return Case(attachment.space, attachment.decision(), expected, folder, load(folder).eval())
