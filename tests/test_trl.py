"""The callback in unmodified TRL trainers. Oracles: the live masked model, and losses put together by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from atp import ATPCallback, load
from atp.data import causal
from atp.errors import UnsupportedModelError
from atp.layers import attachment_of
from tests import runs, tiny

trl = pytest.importorskip("trl")

# TRL 1.16 sets gradient_checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

ARGUMENTS = {
    "use_cpu": True,
    "max_steps": runs.STEPS,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.mark.parametrize(
    "changes", [{}, {"packing": True, "max_length": 24, "completion_only_loss": True}], ids=["plain", "packed"]
)
def test_sft(tmp_path: Path, changes: dict[str, Any]) -> None:
    callback = ATPCallback(runs.config(calibration_batch_size=1, mode="alternating", **runs.LATE))
    trainer = trl.SFTTrainer(
        model=runs.peft_model(),
        args=trl.SFTConfig(output_dir=str(tmp_path), **(ARGUMENTS | {"max_steps": 6} | changes)),
        train_dataset=Dataset.from_list([tiny.row(i) for i in range(80)]),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.learner.frozen
    assert any("atp/sparsity" in entry for entry in trainer.state.log_history)
    assert any(entry.get("atp/teacher_kl", 0) > 0 for entry in trainer.state.log_history), "no logits are made"
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert (tmp_path / "pruned" / "tokenizer.json").exists()


def pair(index: int) -> dict[str, str]:
    row = tiny.row(index)
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": tiny.row(index + 3)["completion"]}


def dpo(folder: Path, callback: ATPCallback, model: Any = None, peft_config: Any = None, **changes: Any) -> Any:
    settings = ARGUMENTS | {"learning_rate": 5e-3, "bf16": False, "precompute_ref_log_probs": True} | changes
    return trl.DPOTrainer(
        model=model or runs.peft_model(),
        args=trl.DPOConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list([pair(i) for i in range(80)]),
        eval_dataset=Dataset.from_list([pair(i) for i in range(90, 94)]),
        processing_class=tiny.tokenizer(),
        callbacks=[callback],
        peft_config=peft_config,
    )


def adapters(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters() if f".{name}." in k}


@pytest.mark.parametrize("mode", ["joint", "alternating"])
def test_dpo(tmp_path: Path, mode: str) -> None:
    """TRL adds a frozen copy of the adapter, the reference: it is neither trained nor exported."""
    base = tiny.folder(tmp_path / "base")
    callback = ATPCallback(runs.config(mode=mode, calibration_batch_size=2, **runs.LATE))
    trainer = dpo(tmp_path / "run", callback, runs.peft_model(folder=base), eval_strategy="steps", eval_steps=5)
    reference, before = adapters(trainer.model, "ref"), adapters(trainer.model, "default")
    assert reference
    trainer.train()
    assert runs.same(adapters(trainer.model, "ref"), reference)
    assert not runs.same(adapters(trainer.model, "default"), before)
    assert callback.learner.frozen
    assert abs(callback.summary()["sparsity"] - 0.4) < 0.02
    logs = trainer.state.log_history
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-5), "the reference is the model before the first step"
    assert any(entry.get("atp/teacher_kl", 0) > 0 for entry in logs), "no logits are made"
    ids = torch.arange(2, 14)[None]
    live = trainer.model.eval()(input_ids=ids).logits
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "pruned").eval()
    torch.testing.assert_close(pruned(input_ids=ids).logits, live, rtol=1e-4, atol=1e-5)
    again = load(tmp_path / "run").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, live, rtol=1e-4, atol=1e-5)


def test_of_preference_pairs_decisions_see_the_loss_of_preferred_completions(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, ATPCallback(runs.config()))
    batch = next(iter(trainer.get_train_dataloader()))
    seen = causal(batch)
    model = runs.peft_model().eval()
    with torch.no_grad():
        found = model(**seen).loss
        chosen = len(batch["input_ids"]) // 2
        ids, learned = batch["input_ids"][:chosen, 1:], batch["completion_mask"][:chosen, 1:].bool()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:chosen, :-1]
        expected = -log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0][learned].mean()
    torch.testing.assert_close(found, expected)
    assert seen["labels"].shape == (chosen, batch["input_ids"].shape[1])


def test_dpo_with_a_reference_that_would_be_pruned_is_refused(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, ATPCallback(runs.config()), precompute_ref_log_probs=False)
    with pytest.raises(UnsupportedModelError, match="DPOConfig: .* set precompute_ref_log_probs=True"):
        trainer.train()
    assert attachment_of(trainer.model) is None


def test_dpo_that_makes_the_adapter_itself(tmp_path: Path) -> None:
    """The reference is then the base model, adapters off."""
    callback, base = ATPCallback(runs.config()), tiny.model()
    size = base.num_parameters()
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    dpo(tmp_path, callback, base, peft_config=lora).train()
    assert callback.learner.frozen
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").num_parameters() < size
