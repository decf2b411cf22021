"""GGUF: one file that llama.cpp, and what is built on it (Ollama, LM Studio, llama-cpp-python), opens.

`write_gguf(folder, out, dtype)` reads an exported Hugging Face folder. Equal blocks are written under the family's own
architecture; ragged `width` under `deci`, the one of llama.cpp's that has head and channel counts per block, where
`deci` computes what the family does (Llama, Mistral, Qwen2, Phi-3, Granite). `disp` is refused.

    families.py    which architecture runs which family, and what it computes otherwise
    tensors.py     names and layout, sizes of blocks
    metadata.py    key-values
    vocabulary.py  the tokenizer
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
