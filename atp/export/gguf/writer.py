"""`write_gguf`: a Hugging Face folder -> one GGUF file, a tensor at a time."""

import logging
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from atp.errors import ATPError, CheckpointError, UnsupportedModelError
from atp.export.gguf.layout import lay_out
from atp.export.gguf.metadata import add_metadata
from atp.export.gguf.source import Source
from atp.export.gguf.tensors import Entry
from atp.export.gguf.vocabulary import add_vocabulary
from atp.files import file_written_beside

_Type, _File = gguf.GGMLQuantizationType, gguf.LlamaFileType
DTYPES = {
    "f32": (_Type.F32, _File.ALL_F32),
    "f16": (_Type.F16, _File.MOSTLY_F16),
    "bf16": (_Type.BF16, _File.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, _File.MOSTLY_Q8_0),
}
_LARGEST = {_Type.F16: 65504.0, _Type.Q8_0: 65504.0 * 127}
logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of what is not so


def write_gguf(folder: str | Path, out: str | Path, dtype: str = "f16", *, overwrite: bool = False) -> Path:
    """Write the model in `folder` as the GGUF file `out`, for llama.cpp and what is built on it.

    Args:
        folder: a Hugging Face folder with a tokenizer, which `atp.export` or `save_pretrained` wrote.
        dtype: of matrices: "f32", "f16", "bf16" or "q8_0" (8 bits, blocks of 32; rows that do not divide stay f16).
            Norms and biases are always f32, as llama.cpp wants them.
        overwrite: replace `out` if it exists, once the new file is complete.

    Returns:
        The file written.

    Raises:
        ATPError: where `dtype` is unknown or `out` exists.
        UnsupportedModelError: where llama.cpp does not compute this model or tokenize like its tokenizer; with the
            reason, and what to do instead.
        CheckpointError: where the folder is damaged or writing failed; nothing is left behind.
    """
    folder, out = Path(folder).absolute(), Path(out).absolute()
    if dtype not in DTYPES:
        raise ATPError(f"dtype={dtype!r} is unknown: it must be one of {', '.join(DTYPES)}")
    if out.exists() and not overwrite:
        raise ATPError(f"{out} exists: choose another file or pass overwrite=True")
    source = Source(folder)
    layout = lay_out(source.config, source.shapes)
    kind, file_type = DTYPES[dtype]
    with file_written_beside(out) as path:
        writer = gguf.GGUFWriter(path, layout.architecture)
        try:
            for name, entry in layout.entries.items():
                own = _type(entry, kind)
                writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), _bytes(entry, own), own)
            add_metadata(writer, source.config, layout, folder, file_type)
            add_vocabulary(writer, folder, source.config.vocab_size, _ends(source))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for entry in tqdm(layout.entries.values(), desc="atp: writing GGUF", leave=False, delay=2):
                writer.write_tensor_data(_data(source, entry, _type(entry, kind)))
        finally:
            writer.close()
    return out


def require_writable(folder: Path) -> None:
    """Find out now whether `write_gguf` can write the model in `folder`, and its tokenizer, if there is one.

    Raises:
        UnsupportedModelError, CheckpointError: as `write_gguf`.
    """
    source = Source(folder)
    layout = lay_out(source.config, source.shapes)
    if (folder / "tokenizer.json").is_file():
        add_vocabulary(gguf.GGUFWriter(None, layout.architecture), folder, source.config.vocab_size, _ends(source))


def _type(entry: Entry, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(entry.shape) < 2:
        return _Type.F32
    return _Type.F16 if kind == _Type.Q8_0 and entry.shape[-1] % 32 else kind


def _bytes(entry: Entry, kind: gguf.GGMLQuantizationType) -> int:
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(entry.shape)) // per_block * block_bytes


def _data(source: Source, entry: Entry, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    stored = torch.empty(0) if entry.source is None else source.tensor(entry.source)
    tensor = entry.change(stored.float()).contiguous()
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(f"{entry.source} is {tuple(tensor.shape)} where {entry.shape} was said: report this")
    if kind in _LARGEST and max(map(abs, torch.aminmax(tensor))) > _LARGEST[kind]:
        raise UnsupportedModelError(
            f"{entry.source}: holds values too large for {kind.name.lower()}: write bf16 or f32"
        )
    return gguf.quants.quantize(tensor.numpy(), kind)


def _ends(source: Source) -> list[int]:
    """Ids that end a generation."""
    try:
        ends = GenerationConfig.from_pretrained(source.folder, local_files_only=True).eos_token_id
    except (OSError, ValueError):
        ends = source.config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
