"""GGUF: one file that llama.cpp, and what is built on it (Ollama, LM Studio, llama-cpp-python), opens.

`write_gguf(folder, out, dtype)` reads a Hugging Face folder, exported or ordinary, and writes tokenizer, chat template
and licence too. Which of llama.cpp's architectures runs what:

    family                        equal blocks                         blocks of unequal size, or with added biases
    Llama, Mistral                llama                                deci
    Granite                       granite                              deci, its multipliers in the weights
    Qwen2, Phi-3                  qwen2, phi3; deci if heads went      deci, Phi-3's packed projections cut
    Qwen3, Gemma 2 and 3 (text)   qwen3, gemma2, gemma3                refused: uniform=True
    SmolLM3                       smollm3                              refused: uniform=True
    OLMo 2, StarCoder2, StableLM  olmo2, starcoder2, stablelm, with    refused: uniform=True
                                  heads of zeros for those that went
    GPT-NeoX                      gptneox                              refused: uniform=True

Blocks that lost an attention, an MLP or both are unequal blocks. Space `disp` is refused: no architecture of
llama.cpp's reads a part of the residual stream. So are mixtures of experts, rotation by `dynamic` and `longrope`, and,
by name, whatever a family's config can say and llama.cpp does not compute.

    families.py    which architecture runs which family, and what it computes otherwise
    layout.py      the architecture and sizes of one model, values changed from one meaning to the other
    tensors.py     GGUF's names, and what is done to values on the way
    deci.py        separate projections, and stand-ins for lost halves
    padding.py     heads of zeros
    metadata.py    key-values
    vocabulary.py  the tokenizer's pieces and how it splits text
    special.py     its special tokens
    source.py      reading the folder
    writer.py      writing the file
"""

from pathlib import Path
from typing import Any

from atp.errors import ATPError

__all__ = ["write_gguf"]

try:
    from atp.export.gguf.writer import write_gguf
except ModuleNotFoundError as error:
    if error.name != "gguf":
        raise

    def write_gguf(*_: Any, **__: Any) -> Path:  # type: ignore[misc]
        """Say what is missing."""
        raise ATPError("writing GGUF needs the package gguf: pip install 'atp[gguf]'")
