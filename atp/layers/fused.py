"""Decoder layers whose masks act where there is a pass over the data anyway: in norms, residual adds and SwiGLU.

    r, n = add_norm_gather(r, u)     in place of a mask on what wrote u, an add, a norm, and masks on what reads n
    h = gated(gate, up, mask)        in place of an activation, a product, and a mask on what reads h

(`atp.ops.boundary`, `atp.ops.gated`). Under a final decision what is read and written are kept features only. A layer
is fused where its `forward`, its norms' and its MLP's are Llama's to the letter, as those of many families are. Not
covered: weights of norms that are sharded over processes.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from atp.layers.masked import masked
from atp.layers.swapping import has_own_forward, own_class, restore_forward, swap_forward
from atp.ops.boundary import add_norm_gather
from atp.ops.gated import gated
from atp.ops.selection import Selection, scatter_features
from atp.structure.sharding import is_ordinary
from atp.structure.space import ATTENTION_IN, ATTENTION_OUT, MLP, MLP_IN, MLP_OUT

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
"""What `gated` calls the functions that transformers knows as these classes."""

KINDS = (ATTENTION_IN, ATTENTION_OUT, MLP_IN, MLP_OUT, MLP)
"""Kinds of group set that a fused layer takes care of, where the space has them."""

_SLOT = "_atp_fused"


@dataclass(frozen=True, eq=False)
class FusedMasks:
    """What one decoder layer takes care of itself, by kind of group set; its linear layers do not.

    Attributes:
        masks: leaves to multiply by, `(size,)`.
        kept: what is there at all, where the rest is gone.
        impl: of the operations, see `atp.ops.implementation`.
    """

    masks: Mapping[str, Tensor]
    kept: Mapping[str, Selection]
    impl: str


def is_fusable(layer: nn.Module) -> bool:
    """Whether a decoder layer is Llama's but for its attention and its weights."""
    if not _is_as(layer, LlamaDecoderLayer):
        return False
    known: Any = layer
    norms = (known.input_layernorm, known.post_attention_layernorm)
    if not all(_is_as(norm, LlamaRMSNorm) and is_ordinary(norm.weight) for norm in norms):
        return False
    return _is_as(known.mlp, LlamaMLP) and type(known.mlp.act_fn).__name__ in _ACTIVATIONS


def fuse(layer: nn.Module, masks: FusedMasks) -> None:
    """Make a decoder layer that `is_fusable` take care of `masks` from now on, instead of those it had, if any."""
    known: Any = layer
    for module, make in ((layer, _layer_forward), (known.mlp, _mlp_forward)):
        swap_forward(module, "Fused", make)
        object.__setattr__(module, _SLOT, masks)


def fused_masks(layer: nn.Module) -> FusedMasks:
    """What `fuse` has made a layer take care of."""
    masks: FusedMasks = vars(layer)[_SLOT]
    return masks


def unfuse(layer: nn.Module) -> None:
    """Undo `fuse`, where it is in force."""
    known: Any = layer
    if _SLOT not in vars(layer):
        return
    for module in (layer, known.mlp):
        restore_forward(module)
        object.__delattr__(module, _SLOT)


def _layer_forward(_cls: type[nn.Module]) -> Callable:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        fused = fused_masks(self)
        _, normed = _at_norm(fused, hidden_states, None, self.input_layernorm, ATTENTION_IN)
        update, _ = self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        residual, normed = _at_norm(fused, hidden_states, update, self.post_attention_layernorm, MLP_IN)
        return _added(fused, residual, self.mlp(normed))

    return forward


def _at_norm(fused: FusedMasks, residual: Tensor, update: Tensor | None, norm: Any, read: str) -> tuple[Tensor, Tensor]:
    """The stream with what attention wrote, if it has written, and what `read` sees of it."""
    weight = norm.weight * fused.masks[read] if read in fused.masks else norm.weight
    wrote = update is not None
    return add_norm_gather(
        residual,
        update,
        weight,
        norm.variance_epsilon,
        written=fused.kept.get(ATTENTION_OUT) if wrote else None,
        update_mask=fused.masks.get(ATTENTION_OUT) if wrote else None,
        read=fused.kept.get(read),
        impl=fused.impl,
    )


def _added(fused: FusedMasks, residual: Tensor, update: Tensor) -> Tensor:
    """The stream with what the MLP wrote; no norm is at hand there."""
    if MLP_OUT in fused.masks:
        update = masked(update, fused.masks[MLP_OUT])
    if MLP_OUT in fused.kept:
        update = scatter_features(update, fused.kept[MLP_OUT].index, residual.shape[-1])
    return residual + update


def _mlp_forward(_cls: type[nn.Module]) -> Callable:
    def forward(self: Any, x: Tensor) -> Tensor:
        fused = fused_masks(self)
        activation = _ACTIVATIONS[type(self.act_fn).__name__]
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up, fused.masks.get(MLP), activation=activation, impl=fused.impl))

    return forward


def _is_as(module: nn.Module, known: type[nn.Module]) -> bool:
    own, other = (_source(cls.forward) for cls in (own_class(module), known))
    return own is not None and own == other and not has_own_forward(module)


@cache
def _source(function: Callable) -> str | None:
    try:
        return "".join(inspect.getsource(function).split())
    except (OSError, TypeError):  # no source at hand
        return None
