"""The one table of names: what a decoder's linear layers are called, and plans for families that ship none.

`config.base_model_tp_plan` tells readers from writers; it does not tell queries from keys, or how packed projections
lay out their rows. That is read here from the layer's own name. A name that is not in this table is an error, never
a guess.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedConfig


class Role(NamedTuple):
    """What one linear layer does: `part` is attention or mlp, `packs` lists what its output rows hold in order."""

    part: str
    packs: tuple[str, ...]
    interleaved: bool = False


READERS = {
    "q_proj": Role("attention", ("q",)),
    "k_proj": Role("attention", ("k",)),
    "v_proj": Role("attention", ("v",)),
    "qkv_proj": Role("attention", ("q", "k", "v")),
    "query_key_value": Role("attention", ("q", "k", "v"), interleaved=True),
    "gate_proj": Role("mlp", ("gate",)),
    "up_proj": Role("mlp", ("up",)),
    "gate_up_proj": Role("mlp", ("gate", "up")),
    "c_fc": Role("mlp", ("up",)),
    "fc1": Role("mlp", ("up",)),
    "dense_h_to_4h": Role("mlp", ("up",)),
}

WRITERS = {
    "self_attn.o_proj": "attention",
    "self_attn.dense": "attention",
    "attention.dense": "attention",
    "mlp.down_proj": "mlp",
    "mlp.c_proj": "mlp",
    "mlp.fc2": "mlp",
    "mlp.dense_4h_to_h": "mlp",
}

READER_STYLES = {"colwise", "colwise_gather_output"}
WRITER_STYLES = {"rowwise", "rowwise_split_input"}
IGNORED_STYLES = {"replicated_with_grad_allreduce"}

_LLAMA_LIKE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

PLANS = {"nemotron": _LLAMA_LIKE, "stablelm": _LLAMA_LIKE}

DERIVED_HEAD_SIZE = {"gpt_neox", "helium", "stablelm"}
"""Families whose head size is hidden_size / heads, whatever `head_dim` says: their configs cannot say fewer heads."""

NORMS_BEFORE = {"input_layernorm", "pre_feedforward_layernorm"}
"""Norms of a block that read the residual stream for attention or the MLP."""

NORMS_WRITING = {"post_feedforward_layernorm"}
"""Norms between a writer and the residual stream."""

NORMS_EITHER = {"post_attention_layernorm"}
"""Of the second kind where the block has another of them (Gemma 2 and 3, OLMo 2), else of the first (Llama)."""

_PER_BLOCK_SETTINGS = ("layer_types", "no_rope_layers")
"""Entries of configs that are a list with one value a block."""


def keep_blocks(config: PreTrainedConfig, blocks: Sequence[int]) -> None:
    """Cut a decoder's `config` to these of its blocks, in place."""
    for name in _PER_BLOCK_SETTINGS:
        if values := getattr(config, name, None):
            setattr(config, name, [values[index] for index in blocks])
    config.num_hidden_layers = len(blocks)
