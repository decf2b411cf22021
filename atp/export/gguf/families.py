"""What llama.cpp computes: its architecture for each family of transformers', and where the two part.

Read from llama.cpp's `src/models/*.cpp`. Every claim here is run by `tests/export/gguf/test_llama_cpp.py`.

`deci` has head and channel counts of its own in every block, and otherwise computes what `llama` does: RMS norms before
each half, rotary pairs side by side over the whole head, SiLU, an optional bias on any linear layer. Families that do
the same under other names can be written as `deci`: rows are permuted, packed projections cut, scalars multiplied in.

Not covered: mixtures of experts, vision, sliding windows where llama.cpp has none (see `metadata.context_length`).
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from atp.errors import UnsupportedModelError

DECI = "deci"

_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_READERS = ("attn_q", "attn_k", "attn_v")
_LINEARS = (*_READERS, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ROTATIONS = ("default", "linear", "llama3", "yarn")
_YARN = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
"""Of yarn, what is not written, and the values with which nothing is missed."""

_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class Family:
    """How llama.cpp runs one family.

    Attributes:
        architecture: llama.cpp's name.
        biases: tensors for which it looks for a bias.
        activations: those that it computes; GELU is its tanh form, from a float16 table.
        pairs: whether a head's rotary pairs lie side by side, where transformers has them half a head apart.
        square: whether heads x head_dim must be the hidden size.
        norm_offset: what its norms' weights have on top of transformers'.
        own_head: whether it needs `output.weight` where transformers ties the head to the embedding.
        tied: whether it has no `output.weight`.
        window: whether it has sliding windows, and every how many blocks one sees everything.
        deci: whether `deci` can compute it.
    """

    architecture: str
    biases: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    pairs: bool = False
    square: bool = False
    norm_offset: float = 0.0
    own_head: bool = False
    tied: bool = False
    window: int | None = None
    deci: bool = False


FAMILIES = {
    "llama": Family("llama", _LINEARS, pairs=True, deci=True),
    "mistral": Family("llama", _LINEARS, pairs=True, deci=True),
    "granite": Family("granite", _LINEARS, pairs=True, deci=True),
    "smollm3": Family("smollm3", _LINEARS, pairs=True),
    "qwen2": Family("qwen2", _READERS, square=True, deci=True),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3", square=True, deci=True),
    "gemma2": Family("gemma2", activations=_GELU, norm_offset=1.0, tied=True, window=2),
    "gemma3_text": Family("gemma3", activations=_GELU, norm_offset=1.0, tied=True, window=6),
    "olmo2": Family("olmo2", square=True, own_head=True),
    "starcoder2": Family("starcoder2", (*_LINEARS, *_NORMS), activations=_GELU, square=True),
    "stablelm": Family("stablelm", (*_READERS, *_NORMS), square=True, own_head=True),
    "gpt_neox": Family(
        "gptneox",
        ("attn_qkv", "attn_output", "ffn_up", "ffn_down", *_NORMS),
        activations=_GELU,
        square=True,
        own_head=True,
    ),
}
AS_DECI = Family(DECI, _LINEARS, pairs=True, deci=True)


def model_type(config: Any) -> str:
    """The family's name; a ragged folder's own says `atp`."""
    if getattr(config, "atp", None) and config.atp.get("blocks"):
        return str(type(config).__mro__[1].model_type)  # type: ignore[attr-defined]
    return str(config.model_type)


def family_of(config: PreTrainedConfig) -> Family:
    """llama.cpp's side of a model.

    Raises:
        UnsupportedModelError: naming what llama.cpp computes otherwise or not at all.
    """
    name = model_type(config)
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{name}: no GGUF of this family can be written: keep the Hugging Face folder "
            f"(supported: {', '.join(FAMILIES)})"
        )
    blocks = (getattr(config, "atp", None) or {}).get("blocks") or {}
    if blocks.get("selections"):
        raise UnsupportedModelError(
            "space 'disp': no architecture of llama.cpp's reads and writes a part of the residual stream, so no GGUF "
            f"can be written: keep the Hugging Face folder, or train in space='width' with uniform=True ({name})"
        )
    if "value" in blocks.get("kept", ()):
        raise UnsupportedModelError(
            "space 'values': in llama.cpp the values of all blocks have as many dimensions, so no GGUF can be written: "
            f"keep the Hugging Face folder, or train in space='width' with uniform=True ({name})"
        )
    for why in _differences(config, name, FAMILIES[name]):
        raise UnsupportedModelError(f"{name}: {why}: keep the Hugging Face folder")
    return FAMILIES[name]


def rope(config: Any) -> dict[str, Any]:
    """Rotation of the blocks that see everything."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _differences(config: Any, name: str, family: Family) -> list[str]:
    """What this config asks for and llama.cpp does not compute."""
    own = FAMILIES[name].architecture
    found = []
    activation = config.hidden_activation if name in ("gemma2", "gemma3_text") else config.hidden_act
    if activation not in family.activations:
        found.append(f"llama.cpp's {own} has no activation {activation!r}")
    if family.tied and not config.tie_word_embeddings:
        found.append(f"llama.cpp's {own} takes the head from the embedding, and here they differ")
    if name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        found.append("llama.cpp's gemma2 always caps logits")
    if name == "gemma3_text" and (config.attn_logit_softcapping or config.final_logit_softcapping):
        found.append("llama.cpp's gemma3 caps no logits")
    found += _of_rotation(rope(config))
    rotary = rope(config).get("partial_rotary_factor", 1.0)
    if int(rotary * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)) % 2:
        found.append("an odd number of dimensions is rotated")
    if getattr(config, "use_bidirectional_attention", None):
        found.append("attention is not causal")
    if family.window and not _sees_everything_every(family.window, config.layer_types):
        found.append(f"llama.cpp lets one block in {family.window} see everything, and layer_types says others")
    if name == "stablelm" and config.qk_layernorm:
        found.append("qk_layernorm has not been tried")
    if not (config.use_bias if name == "starcoder2" else config.attention_bias if name == "gpt_neox" else True):
        found.append(f"llama.cpp's {own} needs a bias on every linear layer")
    if name == "smollm3":
        fourth = [int((block + 1) % 4 != 0) for block in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != fourth:
            found.append(
                "llama.cpp's smollm3 leaves out rotation in every fourth block, and no_rope_layers says others"
            )
    return found


def _of_rotation(parameters: dict[str, Any]) -> list[str]:
    kind = parameters["rope_type"]
    if kind not in _ROTATIONS:
        return [f"rope_type {kind!r} is not written to GGUF"]
    changed = {name: parameters.get(name, usual) for name, usual in _YARN.items()} if kind == "yarn" else {}
    return [
        f"yarn with {name}={value} is not written to GGUF"
        for name, value in changed.items()
        if value not in (_YARN[name], None)
    ]


def _sees_everything_every(period: int, layer_types: list[str]) -> bool:
    return all((kind == "full_attention") == ((block + 1) % period == 0) for block, kind in enumerate(layer_types))
