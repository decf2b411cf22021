"""Tiny exported folders with a tokenizer, of sizes that llama.cpp takes, and what transformers makes of them."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from atp.export import export, load
from tests import families
from tests.export.cases import masked
from tests.families import FAMILIES, _family

NEOX = {"num_key_value_heads": None, "num_attention_heads": 4, "intermediate_size": 144, "hidden_size": 64}
CASES: dict[str, Callable[[], PretrainedConfig]] = {
    **{name: FAMILIES[name] for name in ("llama", "llama_mqa", "llama_biases", "llama_tied", "qwen2", "qwen3")},
    **{name: FAMILIES[name] for name in ("gemma2", "phi3", "olmo2", "granite", "starcoder2", "stablelm")},
    "mistral": _family("Mistral", sliding_window=32, head_dim=8),
    "qwen2_tied": _family("Qwen2", tie_word_embeddings=True),
    "gemma3": _family("Gemma3Text", num_hidden_layers=6, head_dim=12, sliding_window=6, tie_word_embeddings=True),
    "granite_tied": _family(
        "Granite",
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        attention_multiplier=0.2,
        tie_word_embeddings=True,
    ),
    "smollm3": _family("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "stablelm_parallel": _family("StableLm", use_parallel_residual=True),
    "gpt_neox": _family("GPTNeoX", **NEOX),
    "gpt_neox_serial": _family("GPTNeoX", **NEOX, use_parallel_residual=False),
}
RAGGED = (
    "llama",
    "llama_mqa",
    "llama_biases",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen2_tied",
    "phi3",
    "granite",
    "granite_tied",
)
"""What `deci` computes."""
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *string.ascii_letters,
    *string.digits,
    *".,:;!?()-'",
    "Ġ",
    "Ċ",
    "th",
    "in",
    "er",
    "on",
]
FOLDERS = TemporaryDirectory(prefix="atp-test-")
"""Removed when the process ends."""


@dataclass(frozen=True)
class Folder:
    """An exported folder and the model that transformers loads from it."""

    path: Path
    model: PreTrainedModel


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over letters and digits, with as many tokens as the tiny models have."""
    pieces = PIECES + [f"<{i}>" for i in range(families.VOCABULARY - len(PIECES))]
    merges = [("t", "h"), ("i", "n"), ("e", "r"), ("o", "n")]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(model: PreTrainedModel, path: Path) -> Folder:
    """`model` as it is, with a tokenizer."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return Folder(path, load(path).eval())


@cache
def folder(case: str, space: str) -> Folder:
    """A model of `CASES`, tuned at random, pruned in `space` at random, and exported."""
    model = masked(families.with_lora(families.from_config(CASES[case]())), space)
    path = export(model, Path(FOLDERS.name) / case / space, processing_class=tokenizer())
    return Folder(path, load(path).eval())


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens, the end never among them, and log-probabilities `(steps, vocabulary)`; without a cache."""
    end = torch.tensor([model.config.eos_token_id])
    tokens, rows = list(prompt), []
    for _ in range(steps):
        row = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        rows.append(row)
        tokens.append(int(row.index_fill(0, end, -torch.inf).argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


def clear_steps(rows: Tensor, margin: float, end: int = 2) -> int:
    """Steps before the first at which the best two tokens are closer than `margin`."""
    best = rows.index_fill(1, torch.tensor([end]), -torch.inf).topk(2).values
    close = torch.nonzero(best[:, 0] - best[:, 1] < margin).flatten()
    return int(close[0]) if len(close) else len(rows)
