"""Models of their own on the same tensors, so that many cases need the memory of one, and masks for them."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from atp.config import ATPConfig
from atp.criteria import scores
from atp.criteria.ranking import rank
from atp.layers import Attachment, attach
from atp.structure.budget import project
from atp.structure.building import build_space
from atp.structure.discovery import discover


def on_the_same_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own, whose parameters and buffers are those of `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def attached(model: nn.Module, config: ATPConfig) -> Attachment:
    """`model` under the masks, all ones, of the space that `config` names."""
    return attach(model, build_space(discover(model), config.space, config.uniform, config.round_to))


def mask_at_random(model: nn.Module, config: ATPConfig) -> None:
    """Put `model` under hard masks on budget, the same share of each block."""
    attachment = attached(model, config)
    ranked = rank(scores.random(attachment.space, config.seed), attachment.space, "block", (0, 0))
    attachment.set_masks(project(ranked, attachment.space, config.sparsity))
