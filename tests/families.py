"""One table of tiny random models, one per way a supported family differs; nothing is downloaded.

Weights, biases and norm weights are random and far from their initial zeros and ones, so that a lost bias or a norm
that was not sliced shows. LoRA has random B matrices for the same reason.
"""

import warnings
from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _family(name: str, **changes: object) -> Callable[[], PretrainedConfig]:
    sizes = {key: value for key, value in (SIZES | changes).items() if value is not None}
    return lambda: getattr(transformers, f"{name}Config")(**sizes)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _family("Llama"),
    "llama_mha": _family("Llama", num_key_value_heads=6),
    "llama_mqa": _family("Llama", num_key_value_heads=1),
    "llama_biases": _family("Llama", attention_bias=True, mlp_bias=True),
    "llama_tied": _family("Llama", tie_word_embeddings=True),
    "mistral": _family("Mistral", sliding_window=6, head_dim=8),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", head_dim=12),
    "gemma2": _family("Gemma2", num_hidden_layers=3, head_dim=12, sliding_window=6, tie_word_embeddings=True),
    "gemma3": _family(
        "Gemma3Text",
        num_hidden_layers=3,
        head_dim=12,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "phi3": _family("Phi3"),
    "olmo2": _family("Olmo2"),
    "granite": _family(
        "Granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.2
    ),
    "smollm3": _family("SmolLM3", num_hidden_layers=3, no_rope_layers=[1, 0, 1]),
    "starcoder2": _family("Starcoder2", use_bias=True, sliding_window=None),
    "stablelm": _family("StableLm", use_qkv_bias=True),  # ships no plan: ours
    "gpt_neox": _family("GPTNeoX", num_key_value_heads=None, num_attention_heads=4, intermediate_size=144),
    "gpt_neox_serial": _family(
        "GPTNeoX", num_key_value_heads=None, num_attention_heads=4, intermediate_size=144, use_parallel_residual=False
    ),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny float32 model of `family` in evaluation mode, with random weights in every parameter."""
    return from_config(FAMILIES[family](), seed)


def from_config(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """As `build`, of any config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def with_lora(model: PreTrainedModel, seed: int = 1, **changes: object) -> PeftModel:
    """`model` under LoRA of rank 4 on all linears, its B matrices random."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = get_peft_model(model, LoraConfig(**(settings | changes)))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.15)
    return tuned.eval()


def checkpoint(model: torch.nn.Module, use_reentrant: bool | None = False) -> None:
    """Switch activation checkpointing on, by the only name that transformers has for it from 5.17 on.

    Args:
        use_reentrant: nothing is said of it if None.
    """
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model.gradient_checkpointing_enable({} if use_reentrant is None else {"use_reentrant": use_reentrant})


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of unequal length, `(1, tokens)` each, as one batch."""
    longest = max(row.shape[1] for row in rows)
    ids = [torch.nn.functional.pad(row, (0, longest - row.shape[1])) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (0, longest - row.shape[1])) for row in rows]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


def tokens(rows: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    """Random token ids, `(rows, length)`, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits(model: torch.nn.Module) -> Tensor:
    """Logits of `tokens()`, `(rows, length, vocabulary)`."""
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return ((actual - expected).norm() / expected.norm()).item()
