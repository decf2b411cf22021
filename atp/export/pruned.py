"""What an exported folder holds, in words: sizes, what is left of them, and what opens it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.errors import ATPError
from atp.structure.space import ATTENTION_IN, ATTENTION_OUT, HIDDEN, KV, MLP, MLP_IN, MLP_OUT, VALUE, WHOLE_BLOCK

_KINDS = {
    KV: "key/value heads (with their query heads)",
    VALUE: "dimensions of values",
    MLP: "MLP channels",
    ATTENTION_IN: "residual dimensions read by attention",
    ATTENTION_OUT: "residual dimensions written by attention",
    MLP_IN: "residual dimensions read by the MLP",
    MLP_OUT: "residual dimensions written by the MLP",
}
_OF_THE_MODEL = {HIDDEN: "residual dimensions", WHOLE_BLOCK: "blocks"}


@dataclass(frozen=True)
class Pruned:
    """The `atp` entry of a folder's config, with what surrounds it.

    Attributes:
        model_class: the stock class or the ragged one.
        dtype: of the weights.
        weight_bytes: of the weight files.
        gguf: how to make a GGUF of it, or why llama.cpp has no place for it.
        square: whether heads x head size is the hidden size.
    """

    entry: Mapping[str, Any]
    model_class: str
    dtype: str
    weight_bytes: int
    has_tokenizer: bool
    gguf: str
    square: bool

    @classmethod
    def of(cls, folder: Path) -> "Pruned":
        """Read `folder`, which `export` has written."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return cls(
            entry=config["atp"],
            model_class=config["architectures"][0],
            dtype=str(config.get("dtype")),
            weight_bytes=weights,
            has_tokenizer=(folder / "tokenizer_config.json").is_file(),
            gguf=_gguf(folder),
            square=config["num_attention_heads"] * (config.get("head_dim") or 0) in (0, config["hidden_size"]),
        )

    @property
    def percent(self) -> str:
        """Share of the prunable weights that is gone."""
        return _percent(self.entry["sparsity"])

    @property
    def is_ragged(self) -> bool:
        """Whether blocks have sizes of their own."""
        return "blocks" in self.entry

    @property
    def vllm(self) -> str:
        """How vLLM serves its uneven blocks, or why it cannot."""
        kept = self.entry["blocks"]["kept"]
        if VALUE in kept:
            return "not possible: values have fewer dimensions than keys, which vLLM has no place for"
        return _NO_VLLM if 0 in kept.get(KV, ()) else _VLLM

    def table(self) -> str:
        """Sizes before and after, Markdown."""
        before, after = self.entry["parameters"]["before"], self.entry["parameters"]["after"]
        space = self.entry["space"]
        rows = {
            "parameters": f"{after:,} of {before:,} ({_percent(1 - after / before)} fewer)",
            "of the decoder's linear weights removed": self.percent,
            "weight files": f"{_size(self.weight_bytes)}, {self.dtype}",
            "pruning space": ", ".join(f"`{name}`" for name in ([space] if isinstance(space, str) else space)),
        }
        for kind, width in self.entry.get("widths", {}).items():
            rows[_OF_THE_MODEL.get(kind, f"{_KINDS.get(kind, kind)}, of each block")] = _range(width)
        if runs := self.entry.get("runs"):
            rows["pruned in"] = ", then ".join(f"{_percent(run['sparsity'])} (`{run['space']}`)" for run in runs)
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    def how_to_open(self) -> str:
        """What opens this model and how, Markdown."""
        if self.is_ragged:
            first = (
                "Its blocks have sizes of their own, which no class of transformers has. "
                f"`{self.model_class}` is a small subclass of one, in atp and in the file `modeling_atp.py` here, "
                "which needs torch and transformers only."
            )
            rows = {
                "transformers, PEFT": "after `import atp`, or with `trust_remote_code=True`",
                "vLLM": self.vllm,
                "llama.cpp": self.gguf,
            }
        else:
            first = f"It is an ordinary `{self.model_class}` of smaller sizes: whatever opens that class opens it."
            rows = {"transformers, PEFT": _PLAIN, "vLLM": _PLAIN, "llama.cpp": self.gguf}
            if self.model_class == "Qwen2ForCausalLM" and not self.square:
                rows["vLLM"] = _QWEN2
        lines = (*(_REGISTERING if self.is_ragged else ()), *_LOADING, *(_READING if self.has_tokenizer else ()))
        code = "\n".join(["```python", *lines, "```"])
        table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {how} |" for name, how in rows.items())])
        return f"## How to open it\n\n{first}\n\n{code}\n\n{table}"


_REGISTERING = ("import atp  # or, without atp: trust_remote_code=True in every from_pretrained",)
_LOADING = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
)
_READING = ('tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',)
_PLAIN = "as any model; nothing else to install"
_QWEN2 = "with `--model-impl transformers`: its own Qwen2 takes the head size from the head count (0.32.0)"
_GGUF = "`atp export THIS_FOLDER model.gguf --format gguf`"
_VLLM = "where atp is installed beside it: its plugin knows these models"
_NO_VLLM = "not possible: a block has no attention, which vLLM has no place for"


def _gguf(folder: Path) -> str:
    try:
        from atp.export.gguf.writer import require_writable  # noqa: PLC0415  # needs the extra `gguf`
    except ModuleNotFoundError:
        return f"{_GGUF}, with the extra `gguf`; it says so where llama.cpp has no place for the model"
    try:
        require_writable(folder)
    except ATPError as error:
        return f"not possible: {str(error).replace(str(folder), 'THIS_FOLDER')}"
    return _GGUF


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(width: Mapping[str, int]) -> str:
    least, most = width["least"], width["most"]
    return f"{least:,} of {width['full']:,}" if least == most else f"{least:,} to {most:,} of {width['full']:,}"
