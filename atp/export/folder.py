"""Writing what users load: a Hugging Face folder, whole or not at all.

Everything is written beside the destination and renamed into place at the end. `load` reads it back.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from atp.errors import ATPError
from atp.export.compaction import compact_tensors
from atp.export.layout import empty_model
from atp.files import written_beside
from atp.layers import attachment_of
from atp.structure.live import causal_lm
from atp.structure.space import Space


def export(
    model: nn.Module,
    out: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    overwrite: bool = False,
) -> Path:
    """Save the smaller dense model that `model` computes under its masks; `model` itself does not change.

    Equal widths that the family's own config can say give a plain Hugging Face folder. Other results carry their
    sizes in `config.json` and one modelling file, for `trust_remote_code=True` where `atp` is not imported.

    Args:
        model: a model with masks attached, bare or inside a `PeftModel`; active adapters are merged.
        masks: the decision, per group set `(size,)` of zeros and ones; by default the attached one as it stands.
        processing_class: a tokenizer to save along.
        overwrite: replace `out` if it exists, once the new folder is complete.

    Returns:
        The folder written.

    Raises:
        ATPError: where `model` is not attached, `masks` is not a hard decision, or `out` exists.
        CheckpointError: where writing failed; nothing is left behind, and an old `out` stays as it was.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ATPError("this model has no masks attached: train with ATPCallback or call atp.layers.attach first")
    decision = attachment.decision() if masks is None else {name: m.detach().cpu() for name, m in masks.items()}
    _check_decision(attachment.space, decision)
    out = Path(out).absolute()
    if out.exists() and not overwrite:
        raise ATPError(f"{out} exists: choose another folder or pass overwrite=True")
    compact = compacted(causal_lm(model), attachment.space, decision)
    with written_beside(out) as folder:
        compact.save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
    return out


def compacted(lm: PreTrainedModel, space: Space, masks: Mapping[str, Tensor]) -> PreTrainedModel:
    """The smaller model with its weights, to be saved: buffers that are not saved stay on the meta device."""
    compact = empty_model(lm, space, masks)
    tensors = compact_tensors(lm, space, masks)
    head, embedding = compact.get_output_embeddings(), compact.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and not _still_tied(compact, tensors):
        compact.config.tie_word_embeddings = False
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    tensors |= _zero_biases(compact, tensors)
    compact.load_state_dict(tensors, strict=True, assign=True)
    compact.tie_weights()
    compact.generation_config = copy.deepcopy(lm.generation_config)
    return compact


def _zero_biases(compact: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Biases of layers that got none, in models where the same layer of another block did."""
    blocks = compact.config.atp.get("blocks", {})
    ends = tuple(f".{path}.bias" for path in blocks.get("biases", ()))
    missing = {name: p for name, p in compact.named_parameters() if name.endswith(ends) and name not in tensors}
    return {n: torch.zeros(p.shape, dtype=tensors[n.removesuffix("bias") + "weight"].dtype) for n, p in missing.items()}


def _still_tied(compact: PreTrainedModel, tensors: Mapping[str, Tensor]) -> bool:
    """Whether merging adapters left head and embedding equal."""
    weights = [
        tensors[name]
        for name, p in compact.named_parameters(remove_duplicate=False)
        if p is compact.get_input_embeddings().weight
    ]
    return all(torch.equal(weights[0], other) for other in weights[1:])


def _check_decision(space: Space, masks: Mapping[str, Tensor]) -> None:
    for group_set in space.sets:
        mask = masks.get(group_set.name)
        if mask is None or mask.shape != (group_set.size,):
            raise ATPError(f"masks[{group_set.name!r}] must have shape ({group_set.size},): pass the space's decision")
        if not ((mask == 0) | (mask == 1)).all() or not mask.any():
            raise ATPError(
                f"masks[{group_set.name!r}] must hold zeros and at least one one: only hard decisions are exported"
            )
