"""A tiny model folder with a tokenizer of its own, and JSONL files, all made on the spot."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["fever", "cough", "renal", "cyst", "heart", "valve", "nerve", "palsy", "rash", "anaemia"]


def row(index: int) -> dict[str, str]:
    """A row that differs from every other index's."""
    words = [WORDS[(index * 7 + step * (index + 3)) % len(WORDS)] for step in range(6)]
    return {"prompt": f"Case {index}: {' '.join(words)}.", "completion": f" The finding is {words[0]} {index}."}


def jsonl(path: Path, rows: range) -> Path:
    """Write `rows` as JSONL."""
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in rows), encoding="utf-8")
    return path


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few rows; with `bos` it opens every text with a start token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(("".join(row(i).values()) for i in range(40)), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return made


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every token but three is a word, so that a model that knows nothing still writes words."""
    special = ["<s>", "</s>", "<unk>"]
    syllables = [first + second for first in "bdfghklmnprstvz" for second in "aeiou"]
    drawn = [f"{first}{second}" for first in syllables[:6] for second in syllables]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS, *drawn][:384])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def model(**changes: int) -> LlamaForCausalLM:
    """A random Llama of four small blocks with grouped queries."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes), bos_token_id=0, eos_token_id=1))


def folder(path: Path, words: bool = False) -> Path:
    """Model and tokenizer, or the one of words, as a Hugging Face folder."""
    model().save_pretrained(path)
    (word_tokenizer() if words else tokenizer()).save_pretrained(path)
    return path
