"""Head-wise rotations of attention's values: the same model, its value dimensions in the order of what they are worth.

What attention writes is a sum over heads of O_h A_h V x (A_h: attention weights). Q in V <- Qᵀ V, O_h <- O_h Q, one
orthogonal Q for each KV head, changes nothing (R2 of SpinQuant, arXiv 2405.16406). With

    Q R = G^(-1/2) U,    U: eigenvectors of sum over h of G^(1/2) O_hᵀ S O_h G^(1/2), largest first,

the last ones are those whose loss costs least, to second order (K-FAC as in `criteria.surgeon`). G is the mean of z zᵀ
over tokens and query heads of a KV head, z what O_h reads, S that of d dᵀ, d the loss's gradient at what is written.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from atp.criteria.statistics import Batches, Curvature, curvatures
from atp.criteria.surgeon import typical
from atp.data import learned_tokens
from atp.errors import CalibrationError, UnsupportedModelError
from atp.passes import evaluating, removed_after
from atp.structure.building import build_space
from atp.structure.discovery import Attention, discover
from atp.structure.live import is_quantised

DAMPING = 1e-3
"""Of G, relative to what a typical dimension holds."""

ALLOWED = 5e-2
"""||difference|| / ||logits|| that rounding in bfloat16 may cause; a rotation that is none moves them by their size."""


@torch.no_grad()
def rotate_values(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float:
    """Rotate the values of every attention in place, for `ATPConfig(space="values")` to prune. Before LoRA is put on.

    Gemma-3-270M, medical text, a third of all value dimensions pruned and `o_proj` refitted, nothing tuned: 0.047 nats
    a token more, 0.089 without a rotation.

    Args:
        model: with weights in floating point.
        batches: the model's keyword arguments, with `labels`.

    Returns:
        By what share the logits of the first batch have moved, which is rounding.

    Raises:
        CalibrationError: where there are no batches.
        UnsupportedModelError: where values are no outputs of a layer of their own, weights are quantised or adapted, or
            the model does not compute what it did. Whatever is raised, the model is left as it was.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("there are no batches to rotate values by: give at least one")
    structure = discover(model)
    attentions = [block.attention for block in structure.blocks]
    build_space(structure, "values")  # which says why, where values are no layer's own
    _require_plain(model, attentions)
    first = _on(model.device, batches[0])
    with evaluating(model):
        before = model(**first).logits.float()
        if not before.isfinite().all():
            raise UnsupportedModelError(
                f"{type(model).__name__}: its logits are not finite in {model.dtype}: use another dtype"
            )
        rotations = _rotations(model, attentions, batches)
        state = model.state_dict()
        held = {name: state[name].clone() for name in _turned(attentions) if name in state}
        try:
            for attention, rotation in zip(attentions, rotations, strict=True):
                _turn(model, attention, rotation)
            moved = ((model(**first).logits.float() - before).norm() / before.norm()).item()
            _require_still(model, moved)
        except BaseException:
            model.load_state_dict(held, strict=False)
            raise
    return moved


def _require_still(model: PreTrainedModel, moved: float) -> None:
    if not moved <= ALLOWED:
        raise UnsupportedModelError(
            f"{type(model).__name__}: rotating its values moves its logits by {moved:.2g} of their size, so attention "
            "is not linear in them: use another space than 'values'"
        )


def _require_plain(model: PreTrainedModel, attentions: list[Attention]) -> None:
    for attention in attentions:
        for path in (_value_reader(attention), attention.writer.path):
            layer = model.get_submodule(path)
            if type(layer) is not nn.Linear or is_quantised(layer):
                raise UnsupportedModelError(
                    f"{path} is quantised or adapted: rotate the values of the plain model, before either"
                )


def _value_reader(attention: Attention) -> str:
    assert attention.value_reader is not None
    return attention.value_reader.path


def _turned(attentions: list[Attention]) -> list[str]:
    """Names of what a rotation changes; a values' layer may have no bias."""
    names = [f"{_value_reader(a)}.{name}" for a in attentions for name in ("weight", "bias")]
    return names + [f"{a.writer.path}.weight" for a in attentions]


def _rotations(model: PreTrainedModel, attentions: list[Attention], batches: Batches) -> list[Tensor]:
    """Of every attention, `(KV heads, head size, head size)`, float32."""
    begins = torch.zeros((), device=model.device, requires_grad=True)

    def begin(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output + begins.to(output.dtype)  # so that all that follows has a gradient

    def loss(batch: Any) -> Tensor:
        return model(**_on(model.device, batch)).loss * learned_tokens(batch)

    layers = {a.writer.path: model.get_submodule(a.writer.path) for a in attentions}
    with removed_after([model.get_input_embeddings().register_forward_hook(begin)]), torch.enable_grad():
        measured = curvatures(layers, loss, [begins], batches)
        return [_rotation(a, layers[path].weight, c) for a, (path, c) in zip(attentions, measured, strict=True)]


@torch.no_grad()
def _rotation(attention: Attention, writer: Tensor, curvature: Curvature) -> Tensor:
    size, shared, gradients = attention.head_dim, attention.queries_per_group, curvature.gradients.double()
    found = []
    for group in range(attention.num_kv_heads):
        own = [slice(h * size, (h + 1) * size) for h in range(group * shared, (group + 1) * shared)]
        gram = torch.stack([curvature.inputs[c, c] for c in own]).mean(0).double()
        gram = gram + DAMPING * typical(gram) * torch.eye(size, dtype=gram.dtype, device=gram.device)
        values, vectors = torch.linalg.eigh(gram)
        root, inverse = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
        written = [writer[:, c].double() @ root for c in own]
        worth = sum(w.T @ gradients @ w for w in written)
        found.append(torch.linalg.qr(inverse @ torch.linalg.eigh(worth).eigenvectors.flip(1)).Q.float())
    return torch.stack(found)


def _turn(model: PreTrainedModel, attention: Attention, rotation: Tensor) -> None:
    """V <- Qᵀ V and O_h <- O_h Q, in place."""
    reader, writer = (model.get_submodule(path) for path in (_value_reader(attention), attention.writer.path))
    by_heads = rotation.repeat_interleave(attention.queries_per_group, 0)
    rows = reader.weight.float().unflatten(0, rotation.shape[:2])
    reader.weight.copy_((rotation.mT @ rows).flatten(0, 1))
    if reader.bias is not None:
        biases = reader.bias.float().reshape(*rotation.shape[:2], 1)
        reader.bias.copy_((rotation.mT @ biases).flatten())
    columns = writer.weight.float().T.unflatten(0, by_heads.shape[:2])
    writer.weight.copy_((by_heads.mT @ columns).flatten(0, 1).T)


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return send_to_device(dict(batch), device)
