"""Key-values: the architecture's sizes and constants, and what the file is.

Rotation by `default`, `linear`, `llama3` and `yarn` is written; other kinds are refused. Where transformers has a
sliding window and llama.cpp's architecture has none, the context length said is the window: up to there both compute
the same.
"""

from pathlib import Path
from typing import Any

import gguf

from atp.export.gguf.families import DECI, FAMILIES, model_type, rope
from atp.export.gguf.layout import Layout
from atp.export.gguf.special import fitting_name


def add_metadata(
    writer: gguf.GGUFWriter, config: Any, layout: Layout, folder: Path, file_type: gguf.LlamaFileType
) -> None:
    """Say everything but the tokenizer.

    Raises:
        UnsupportedModelError: where llama.cpp cannot rotate or see as `config` says.
    """
    _add_general(writer, config, folder, file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.blocks))
    _add_sizes(writer, layout)
    _add_epsilon(writer, config)
    _add_rope(writer, config, layout)
    if layout.architecture != DECI:
        _add_own(writer, config)


def context_length(config: Any) -> int:
    """Positions up to which llama.cpp computes what transformers does."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if not window or FAMILIES[model_type(config)].window or (layers and "sliding_attention" not in layers):
        return config.max_position_embeddings
    return min(config.max_position_embeddings, window)


def _add_general(writer: gguf.GGUFWriter, config: Any, folder: Path, file_type: gguf.LlamaFileType) -> None:
    """Name, licence and languages by the model card, where there is one."""
    writer.add_type(gguf.GGUFType.MODEL)
    parameters = writer.get_total_parameter_count()[0]
    general = gguf.Metadata.load(None, folder, None, parameters)
    general.name = fitting_name(general.name or folder.name, folder)
    general.set_gguf_meta_model(writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if atp := getattr(config, "atp", None):
        writer.add_string("atp.space", str(atp["space"]))
        writer.add_float32("atp.sparsity", float(atp["sparsity"]))


def _add_sizes(writer: gguf.GGUFWriter, layout: Layout) -> None:
    """Numbers where blocks are equal, arrays for `deci`."""
    columns = [
        [b.heads for b in layout.blocks],
        [b.kv_heads for b in layout.blocks],
        [b.channels for b in layout.blocks],
    ]
    add = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for write, values in zip(add, columns, strict=True):
        write(values if layout.architecture == DECI else values[0])
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)


def _add_epsilon(writer: gguf.GGUFWriter, config: Any) -> None:
    name = model_type(config)
    if name in ("stablelm", "gpt_neox"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    elif name == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rope(writer: gguf.GGUFWriter, config: Any, layout: Layout) -> None:
    parameters = rope(config)
    kind = parameters["rope_type"]
    writer.add_rope_dimension_count(layout.rotary_dims)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        _add_yarn(writer, config, parameters)


def _add_yarn(writer: gguf.GGUFWriter, config: Any, parameters: dict[str, Any]) -> None:
    original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_yarn_beta_fast(parameters.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(parameters.get("beta_slow") or 1.0)


def _add_own(writer: gguf.GGUFWriter, config: Any) -> None:
    """What only this family has."""
    name = model_type(config)
    if name in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config.use_parallel_residual)
    elif name == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif name == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(0)
    elif name in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif name == "gemma3_text":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
