"""The tokenizer: `tokenizer.json` -> what llama.cpp tokenizes with.

Two kinds: byte-level BPE (GPT-2's and all after it), where llama.cpp knows a few splits of text by name, and BPE over
characters with byte fallback, as SentencePiece's models become (Llama 2, Gemma). For the second, llama.cpp joins the
pair whose result scores highest; the score written is minus the rank of the merge, which gives the same order. To a
text that opens with a space it adds another, as SentencePiece does and tokenizers' `Metaspace` does not.

llama.cpp normalises nothing: of normalisers NFC is passed over (texts that are NFC already, as nearly all are, stay
equal), others are refused.
"""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer

from atp.errors import UnsupportedModelError
from atp.export.gguf.special import add_special, read_tokenizer

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_DIGIT = _CL100K.replace("{1,3}", "")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+@|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*@|"
    r"\p{N}# ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _CASED.replace("@", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("#", "{1,3}|")
_TEKKEN = _CASED.replace("@", "").replace("#", "|")

_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes and words",), False): "gpt-2",
    (("digits", "bytes and words"), False): "smollm",
    ((_CL100K, "bytes"), True): "llama-bpe",
    ((_CL100K, "bytes"), False): "dbrx",
    ((_ONE_DIGIT, "bytes"), False): "qwen2",
    ((_O200K, "bytes"), False): "gpt-4o",
    ((_TEKKEN, "bytes"), True): "tekken",
}
"""llama.cpp's names, by how text is split and whether a piece in the vocabulary is taken without merging."""


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, eos: list[int]) -> None:
    """Write tokens, merges or scores, special tokens and the chat template.

    Args:
        vocabulary: rows of the embedding; ids without a token are said to be unused.
        eos: ids that end a generation; the second is written as the end of a turn.

    Raises:
        UnsupportedModelError: where there is no tokenizer, or llama.cpp cannot tokenize as it does.
    """
    raw, tokenizer = read_tokenizer(folder)
    if raw["model"].get("type") != "BPE":
        raise UnsupportedModelError(
            f"{folder}: llama.cpp tokenizes like this by BPE only, not {raw['model'].get('type')}: "
            "keep the Hugging Face folder"
        )
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    if (highest := max(pieces.values())) >= vocabulary:
        raise UnsupportedModelError(
            f"{folder}: the tokenizer has an id {highest} and the embedding {vocabulary} rows: save the model's own"
        )
    if raw["model"].get("byte_fallback"):
        _add_characters(writer, raw, pieces, tokenizer, vocabulary, folder)
    else:
        _add_bytes(writer, raw, pieces, tokenizer, vocabulary, folder)
    add_special(writer, folder, tokenizer, vocabulary, eos, merges=not raw["model"].get("byte_fallback"))


def _add_bytes(
    writer: gguf.GGUFWriter, raw: dict[str, Any], pieces: dict[str, int], tokenizer: Tokenizer, size: int, folder: Path
) -> None:
    for kind in _flat(raw.get("normalizer"), "normalizers"):
        if kind["type"] != "NFC":
            raise UnsupportedModelError(f"{folder}: llama.cpp has no normaliser {kind['type']}")
    split = tuple(_step(step, folder) for step in _flat(raw.get("pre_tokenizer"), "pretokenizers"))
    name = _SPLITS.get((split, bool(raw["model"].get("ignore_merges"))))
    if name is None:
        raise UnsupportedModelError(
            f"{folder}: no name of llama.cpp's is known for how this tokenizer splits text ({' then '.join(split)}): "
            "keep the Hugging Face folder"
        )
    tokens, types = _tokens(pieces, tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def _step(step: dict[str, Any], folder: Path) -> str:
    """One step of the split in a word or by its expression."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "bytes and words"
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return str(expression)
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Removed", "invert": True}:
            return str(expression)
    raise UnsupportedModelError(f"{folder}: llama.cpp does not split text as {json.dumps(step)} does")


def _add_characters(
    writer: gguf.GGUFWriter, raw: dict[str, Any], pieces: dict[str, int], tokenizer: Tokenizer, size: int, folder: Path
) -> None:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(raw["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    tokens, types = _tokens(pieces, tokenizer, size)
    unknown = pieces.get(raw["model"].get("unk_token") or "")
    for index, token in enumerate(tokens):
        if index == unknown:
            types[index] = gguf.TokenType.UNKNOWN
        elif types[index] == gguf.TokenType.NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[index] = gguf.TokenType.BYTE
        elif types[index] == gguf.TokenType.USER_DEFINED:
            tokens[index] = token.replace("▁", " ")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(_opens_with_space(raw, folder))


def _opens_with_space(raw: dict[str, Any], folder: Path) -> bool:
    """Whether a text is encoded with a space before it; spaces become ▁ in either case."""
    prefix = False
    for step in (*_flat(raw.get("normalizer"), "normalizers"), *_flat(raw.get("pre_tokenizer"), "pretokenizers")):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
                prefix = scheme in ("first", "always")
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:  # after that replacement there is none
                pass
            case _:
                raise UnsupportedModelError(f"{folder}: llama.cpp does not prepare text as {json.dumps(step)} does")
    return prefix


def _flat(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]


def _tokens(pieces: dict[str, int], tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, index in pieces.items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    for index, own in added.items():
        tokens[index] = own.content
        types[index] = int(gguf.TokenType.CONTROL if own.special else gguf.TokenType.USER_DEFINED)
    return tokens, types
