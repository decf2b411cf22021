"""Exported folders, loaded in parts as DeepSpeed has it: their parameters, whole. For `tests/test_processes.py`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainingArguments

from atp import load
from atp.structure.sharding import is_partitioned, whole
from tests.processes import engine_on_cpu


def main(argv: Sequence[str] | None = None) -> None:
    """Load each folder, and write `NAME.safetensors` of all that it holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", nargs="+", type=Path)
    words = parser.parse_args(argv)
    arguments = TrainingArguments(output_dir=str(words.out), report_to="none", **engine_on_cpu())
    for folder in words.folders:
        model = load(folder)
        assert all(is_partitioned(layer.weight) for layer in model.modules() if isinstance(layer, torch.nn.Linear))
        tensors = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
        if arguments.process_index == 0:
            save_file(tensors | dict(model.named_buffers()), words.out / f"{folder.name}.safetensors")


if __name__ == "__main__":
    main()
