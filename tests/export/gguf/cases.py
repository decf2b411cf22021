"""Tiny folders with a tokenizer of 97 tokens, for llama.cpp to open."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests import families

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


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over letters and digits, as many tokens as the tiny models have."""
    pieces = PIECES + [f"<{i}>" for i in range(families.VOCABULARY - len(PIECES))]
    merges = [("t", "h"), ("i", "n"), ("e", "r"), ("o", "n")]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, the end never among them, and log-probabilities `(steps, vocabulary)`; without a cache."""
    tokens, rows = list(prompt), []
    for _ in range(steps):
        row = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        rows.append(row)
        tokens.append(int(row.index_fill(0, torch.tensor([model.config.eos_token_id]), -torch.inf).argmax()))
    return tokens[len(prompt) :], torch.stack(rows)
