"""Special tokens: which there are, which a text opens and closes with, and what llama.cpp goes by a model's name for.

Whether texts open and close with special tokens is found by encoding one.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer

from atp.errors import UnsupportedModelError, in_one_line

_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


@dataclass(frozen=True)
class _Edges:
    """Special tokens around an encoded text."""

    before: list[int]
    after: list[int]


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], Tokenizer]:
    """A folder's `tokenizer.json`, as it stands and as it works.

    Raises:
        UnsupportedModelError: where there is none, or it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModelError(
            f"{folder} has no tokenizer.json, and llama.cpp opens no model without a vocabulary: save the tokenizer "
            "there first (AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER))"
        )
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text), Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise UnsupportedModelError(f"{path} cannot be read ({in_one_line(error)}): save the tokenizer again") from None


def fitting_name(name: str, folder: Path) -> str:
    """A model's name with the one meaning it has to llama.cpp's tokenizer right.

    Under a name with "phi3" or "phi-3" in it, llama.cpp drops spaces after special tokens, and opens no file without
    Phi-3's. No key says so otherwise.
    """
    _, tokenizer = read_tokenizer(folder)
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    drops = {token.content for token in added.values() if token.special and token.rstrip}
    there = {token.content for token in added.values()}
    if drops and there >= _PHI3:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (Phi3)"
    return re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)


def add_special(
    writer: gguf.GGUFWriter, folder: Path, tokenizer: Tokenizer, size: int, eos: list[int], merges: bool
) -> None:
    """Write their ids, the chat template and the merges.

    Raises:
        UnsupportedModelError: where a text opens or closes with more than one.
    """
    try:
        special = gguf.SpecialVocab(folder, load_merges=merges, n_vocab=size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{folder}: tokenizer files cannot be read ({in_one_line(error)}): save them again"
        ) from None
    if merges and not special.merges:
        raise UnsupportedModelError(f"{folder}: the tokenizer has no merges, which llama.cpp needs")
    edges = _edges(tokenizer)
    if len(edges.before) > 1 or len(edges.after) > 1:
        raise UnsupportedModelError(f"{folder}: llama.cpp puts one token at most before and after a text")
    ids = special.special_token_ids
    ids |= {"bos": edges.before[0]} if edges.before else {}
    ids |= {"eos": edges.after[0]} if edges.after else {}
    special.add_special_token = {"bos": bool(edges.before), "eos": bool(edges.after)}
    if eos and "eos" not in ids:
        ids["eos"] = eos[0]
    if others := [index for index in eos if index != ids.get("eos") and index < size]:
        ids.setdefault("eot", others[0])
    special.add_to_gguf(writer, quiet=True)


def _edges(tokenizer: Tokenizer) -> _Edges:
    with_them = tokenizer.encode("a", add_special_tokens=True).ids
    without = tokenizer.encode("a", add_special_tokens=False).ids
    for begin in range(len(with_them) - len(without) + 1):
        if with_them[begin : begin + len(without)] == without:
            return _Edges(with_them[:begin], with_them[begin + len(without) :])
    return _Edges([], [])
