"""What a model costs to use: parameters, FLOPs, where both are, and the latency of one stream."""

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from atp.evaluation.flops import flops_per_token
from atp.evaluation.parts import parts
from atp.evaluation.speed import count_parameters, generation_speed, prefill_speed

_PROMPT_TOKENS = 256
_DECODE_PROMPT_TOKENS = 32
_DECODE_TOKENS = 16
_CALLS = 5


def model_cost(model: PreTrainedModel, speed: bool = True) -> dict[str, Any]:
    """Parameters and FLOPs per token; with `speed`, the latency of a prompt read and of a token written, and parts.

    `parts` is not there where `atp.evaluation.parts` does not know the model's modules.
    """
    sizes = {"parameters": count_parameters(model), "flops_per_token": flops_per_token(model)}
    if not speed:
        return sizes
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROMPT_TOKENS
    prompt_tokens = min(_PROMPT_TOKENS, longest)
    prefill = prefill_speed(model, prompt_tokens=prompt_tokens, calls=_CALLS)
    decode = generation_speed(model, prompt_tokens=_DECODE_PROMPT_TOKENS, generated_tokens=_DECODE_TOKENS, calls=_CALLS)
    by_part = parts(model, prompt_tokens)
    return {
        **sizes,
        **({"parts": by_part} if by_part else {}),
        "prefill": dataclasses.asdict(prefill) | {"prompt_tokens": prompt_tokens},
        "decode": dataclasses.asdict(decode)
        | {
            "prompt_tokens": _DECODE_PROMPT_TOKENS,
            "generated_tokens": _DECODE_TOKENS,
            "latency_ms_per_token": decode.latency_ms / _DECODE_TOKENS,
        },
    }
