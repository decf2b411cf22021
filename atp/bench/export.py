"""Writing the smaller model of a run, LoRA merged, beside a plain save of the dense one."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from atp.bench.copies import mask_at_random, on_the_same_tensors
from atp.bench.timing import Case
from atp.config import ATPConfig
from atp.export import export


def export_cases(base: PreTrainedModel, config: ATPConfig, lora_rank: int) -> list[Case]:
    """`save_pretrained` of `base`, and `export` of a LoRA model on it with random decisions; nothing stays on disk."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=lora_rank, target_modules="all-linear")
    model = get_peft_model(on_the_same_tensors(base), lora)
    mask_at_random(model, config)

    def into_a_folder(write: Callable[[Path], object]) -> Callable[[], None]:
        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / "model")

        return call

    return [
        Case("save the dense model", into_a_folder(base.save_pretrained)),
        Case("export", into_a_folder(lambda folder: export(model, folder))),
    ]
