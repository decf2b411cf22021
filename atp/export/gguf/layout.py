"""Which architecture a model is written under, with which sizes in every block, and its tensors in order.

Sizes are read off the tensors' shapes, so that a plain folder and a ragged one take the same way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atp.errors import UnsupportedModelError
from atp.export.gguf.deci import unpacked, without_lost_parts
from atp.export.gguf.families import AS_DECI, DECI, Family, family_of, model_type, rope
from atp.export.gguf.padding import padded
from atp.export.gguf.tensors import Entries, Entry, Sizes, apart, change_each, named, place, side_by_side, sizes


@dataclass(frozen=True)
class Layout:
    """What the file holds."""

    architecture: str
    head_dim: int
    rotary_dims: int
    blocks: tuple[Sizes, ...]
    entries: Entries


def lay_out(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """How the model of `config`, whose state dict has these shapes, lies in a GGUF file.

    Raises:
        UnsupportedModelError: where llama.cpp has no architecture for it, with the reason and what to do instead.
    """
    family = family_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dims = int(head_dim * rope(config).get("partial_rotary_factor", 1.0))
    entries = named(family, config.num_hidden_layers, shapes)
    blocks = [sizes(entries, block, head_dim) for block in range(config.num_hidden_layers)]
    if why := _why_not_its_own(config, family, entries, blocks, head_dim):
        if not family.deci or rotary_dims != head_dim:
            raise UnsupportedModelError(_refusal(config, family, why, head_dim, rotary_dims))
        family = AS_DECI
        entries = unpacked(entries, blocks, head_dim)
        entries, blocks = without_lost_parts(entries, blocks, config.hidden_size)
    elif family.square:
        entries, blocks = padded(entries, blocks, head_dim, config.hidden_size)
    _change(entries, config, family, blocks, head_dim)
    entries |= _rope_factors(config, family, rotary_dims)
    return Layout(family.architecture, head_dim, rotary_dims, tuple(blocks), entries)


def _why_not_its_own(config: Any, family: Family, entries: Entries, blocks: list[Sizes], head_dim: int) -> str | None:
    """Why llama.cpp's architecture for the family cannot hold this model, or None."""
    first = blocks[0]
    if len(set(blocks)) > 1:
        return "its blocks have unequal sizes"
    if not (first.heads and first.channels):
        return "its blocks have lost an attention or MLP"
    if family.square and family.deci and first.heads * head_dim != config.hidden_size:
        return f"llama.cpp's {family.architecture} has no pruned heads"
    if (
        family.square
        and not family.deci
        and (config.hidden_size % head_dim or config.hidden_size < first.heads * head_dim)
    ):
        return f"llama.cpp's {family.architecture} has no other hidden size than heads x head size"
    for found in filter(None, map(place, entries)):
        if found.kind == "bias" and found.part not in family.biases:
            return f"llama.cpp's {family.architecture} has no bias on {found.part}"
    return None


def _refusal(config: Any, family: Family, why: str, head_dim: int, rotary_dims: int) -> str:
    name = model_type(config)
    if not family.deci:
        other = f"'deci' does not compute {name}"
    else:
        other = f"'deci' rotates whole heads, and here {rotary_dims} of {head_dim} dimensions"
    instead = "train with uniform=True"
    if "bias" in why:
        instead = "train with compensate='auto'"
    elif "hidden size" in why:
        instead = "leave the residual stream whole (space='width', 'depth' or both)"
    return (
        f"{name}: {why}, and of llama.cpp's architectures only 'deci' could say so, but {other}: {instead}, "
        "or keep the Hugging Face folder"
    )


def _change(entries: Entries, config: Any, family: Family, blocks: list[Sizes], head_dim: int) -> None:
    """Values from transformers' meaning to llama.cpp's."""
    if family.own_head and config.tie_word_embeddings:
        entries["output.weight"] = entries["token_embd.weight"]
    if model_type(config) == "gpt_neox":
        change_each(entries, "attn_qkv", partial(apart, head_dim=head_dim))
    for part in ("attn_q", "attn_k") if family.pairs else ():
        change_each(entries, part, partial(side_by_side, head_dim=head_dim))
    if family.norm_offset:
        for name in [name for name in entries if name.endswith("norm.weight")]:
            entries[name] = entries[name].then(partial(torch.add, other=family.norm_offset))
    for part, factor in _factors(config, family, blocks, head_dim).items():
        if not math.isclose(factor, 1.0, rel_tol=1e-6):
            change_each(entries, part, partial(torch.mul, other=factor))


def _factors(config: Any, family: Family, blocks: list[Sizes], head_dim: int) -> dict[str, float]:
    """What tensors are multiplied by, because llama.cpp does not multiply there or by something else."""
    name = model_type(config)
    if name == "granite" and family.architecture == DECI:
        head = config.logits_scaling * (config.embedding_multiplier if config.tie_word_embeddings else 1.0)
        return {
            "token_embd": config.embedding_multiplier,
            "attn_output": config.residual_multiplier,
            "ffn_down": config.residual_multiplier,
            "attn_q": config.attention_multiplier * math.sqrt(head_dim),
            "output_norm": 1.0 / head,
        }
    if name in ("gemma2", "gemma3_text"):
        biggest = len(blocks) == {"gemma2": 46, "gemma3_text": 62}[name]  # by which llama.cpp knows the 27B models
        divisor = config.hidden_size // blocks[0].heads if biggest else head_dim
        return {"attn_q" if name == "gemma2" else "attn_q_norm": math.sqrt(divisor / config.query_pre_attn_scalar)}
    return {}


def _rope_factors(config: Any, family: Family, rotary_dims: int) -> Entries:
    """Llama 3's: what each rotary frequency is divided by."""
    parameters = rope(config)
    if parameters["rope_type"] != "llama3":
        return {}
    if family.architecture not in ("llama", "granite", DECI):
        raise UnsupportedModelError(
            f"{model_type(config)}: llama.cpp's {family.architecture} does not rotate by rope_type 'llama3': "
            "keep the Hugging Face folder"
        )
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return {"rope_freqs.weight": Entry(tuple(plain.shape), None, lambda _: plain / scaled)}
