"""Writing what users load: a Hugging Face folder, whole or not at all.

Everything is written beside the destination and renamed into place at the end. `load` reads it back.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging as hf_logging

from atp.errors import ATPError, UnsupportedModelError, in_one_line
from atp.export.card import About, write_card
from atp.export.compaction import CompactTensors
from atp.export.layout import empty_model
from atp.files import written_by_one
from atp.layers import Attachment, attachment_of
from atp.structure.sharding import settle
from atp.structure.space import Space
from atp.weights import write_weights

logger = logging.getLogger(__name__)


def export(
    model: nn.Module,
    out: str | Path,
    *,
    masks: Mapping[str, Tensor] | None = None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    overwrite: bool = False,
    writes: bool = True,
    about: About | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save the smaller dense model that `model` computes under its masks; `model` itself does not change.

    Where weights are sharded over processes, all of them call it; a layer at a time is whole.

    Equal widths that the family's own config can say give a plain Hugging Face folder. Other results carry their
    sizes in `config.json` and one modelling file, for `trust_remote_code=True` where `atp` is not imported.

    Args:
        model: a model with masks attached, bare or inside a `PeftModel`; active adapters are merged.
        masks: the decision, per group set `(size,)` of zeros and ones; by default the attached one as it stands.
        processing_class: a tokenizer to save along.
        overwrite: replace `out` if it exists, once the new folder is complete.
        writes: False where another process writes, and this one brings its parts.
        about: what the folder's README.md says of the run; without, it says what `model` tells.
        dtype: of the weights in the folder, merged before they are rounded; as in `model`, where left out.

    Returns:
        The folder written.

    Raises:
        ATPError: where `model` is not attached, `masks` is not a hard decision, or `out` exists.
        UnsupportedModelError: naming a tensor that holds values too large for `dtype`.
        CheckpointError: where writing failed; nothing is left behind, and an old `out` stays as it was.
    """
    attachment, decision = attached_decision(model, masks)
    out = free_place(out, overwrite or not writes)
    settle(attachment.lm)
    with written_by_one(out, writes) as folder:
        write_model(attachment.lm, attachment.space, decision, folder, processing_class, dtype=dtype)
        if folder is not None:
            write_card(folder, about or About(base=attachment.lm.name_or_path))
    return out


def attached_decision(model: nn.Module, masks: Mapping[str, Tensor] | None) -> tuple[Attachment, dict[str, Tensor]]:
    """What `model` is attached to, and the decision to export on the CPU: `masks`, or the one in force.

    Raises:
        ATPError: where `model` is not attached, or `masks` is not a hard decision.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise ATPError("this model has no masks attached: train with ATPCallback or call atp.layers.attach first")
    decision = attachment.decision() if masks is None else {name: m.detach().cpu() for name, m in masks.items()}
    _check_decision(attachment.space, decision)
    return attachment, decision


def free_place(out: str | Path, overwrite: bool) -> Path:
    """`out`, absolute.

    Raises:
        ATPError: where it exists and may not be overwritten.
    """
    out = Path(out).absolute()
    if out.exists() and not overwrite:
        raise ATPError(f"{out} exists: choose another folder or pass overwrite=True")
    return out


def write_model(
    lm: PreTrainedModel,
    space: Space,
    masks: Mapping[str, Tensor],
    folder: Path | None,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    *,
    adapters: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """As `save_pretrained` of the smaller model, whose tensors are made as they are written.

    Args:
        folder: None where another process writes, and this one brings its parts.
        adapters: merge the active ones; without, the base as it is under them.
        dtype: as in `export`.
    """
    shell, tensors = empty_model(lm, space, masks), CompactTensors(lm, space, masks, adapters=adapters)
    head, embedding = shell.get_output_embeddings(), shell.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and not _still_tied(shell, tensors):
        shell.config.tie_word_embeddings = False
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    shapes = {name: tensor.shape for name, tensor in shell.state_dict().items()}
    if foreign := [name for name in tensors.names if name not in shapes]:
        raise UnsupportedModelError(
            f"{foreign[0]}: {type(shell).__name__} has no such tensor, so it cannot be exported"
        )
    biases = _zero_biases(shell, tensors)
    dtypes = {name: tensors.dtype(name) for name in tensors.names} | biases
    if dtype is not None:
        dtypes = {name: dtype if each.is_floating_point else each for name, each in dtypes.items()}
    plan = {name: torch.empty(shapes[name], dtype=each, device="meta") for name, each in dtypes.items()}
    shell.load_state_dict(plan, strict=True, assign=True)
    shell.tie_weights()
    shell.generation_config = _generation_config(lm)
    if folder is not None:
        with _no_bar():
            shell.save_pretrained(folder, state_dict={})  # configs, and the modelling file where there is one
    own = {name for name, _ in (*shell.named_parameters(), *shell.named_buffers())}  # tied weights once

    def make(name: str) -> Tensor:
        if name in biases:
            return torch.zeros(shapes[name], dtype=dtypes[name])
        return _rounded(name, tensors[name], dtypes[name])

    write_weights(folder, {name: tensor for name, tensor in plan.items() if name in own}, make)
    if processing_class is not None and folder is not None:
        processing_class.save_pretrained(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Transformers' would say that it wrote 0 of 0 shards."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    if dtype != tensor.dtype and rounded.isinf().any() and tensor.isfinite().all():
        raise UnsupportedModelError(f"{name}: holds values too large for {dtype}: write bfloat16 or float32")
    return rounded


def _zero_biases(shell: PreTrainedModel, tensors: CompactTensors) -> dict[str, torch.dtype]:
    """Biases of layers that got none, in models where the same layer of another block did, and their dtypes."""
    blocks = shell.config.atp.get("blocks", {})
    ends = tuple(f".{path}.bias" for path in blocks.get("biases", ()))
    missing = {name for name, _ in shell.named_parameters() if name.endswith(ends)} - set(tensors.names)
    return {name: tensors.dtype(f"{name.removesuffix('bias')}weight") for name in sorted(missing)}


def _still_tied(shell: PreTrainedModel, tensors: CompactTensors) -> bool:
    """Whether merging adapters left head and embedding equal."""
    first, *others = [
        tensors[name]
        for name, p in shell.named_parameters(remove_duplicate=False)
        if p is shell.get_input_embeddings().weight
    ]
    return all(torch.equal(first, other) for other in others)


def _check_decision(space: Space, masks: Mapping[str, Tensor]) -> None:
    for group_set in space.sets:
        mask = masks.get(group_set.name)
        if mask is None or mask.shape != (group_set.size,):
            raise ATPError(f"masks[{group_set.name!r}] must have shape ({group_set.size},): pass the space's decision")
        may_be_empty = 0 in group_set.counts
        if not ((mask == 0) | (mask == 1)).all() or not (mask.any() or may_be_empty):
            raise ATPError(
                f"masks[{group_set.name!r}] must hold zeros and at least one one: only hard decisions are exported"
            )


def _generation_config(lm: PreTrainedModel) -> GenerationConfig | None:
    """The model's; of one that transformers would not save, such as one that is greedy at a temperature, the ids."""
    config = copy.deepcopy(lm.generation_config)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError as error:
        logger.warning("atp: generation settings are not saved, but for special tokens: %s", in_one_line(error))
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**ids)
    return config
