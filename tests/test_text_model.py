"""Models that read images too: their text part alone. Oracle: the whole model, given text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Mistral3Config,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    SiglipVisionConfig,
)

from atp import export, load, text_model
from atp.cli import main
from atp.errors import UnsupportedModelError
from atp.layers import attach
from atp.models import load_model
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import is_quantised
from tests import families, tiny
from tests.export.cases import random_masks

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = SiglipVisionConfig(**VISION, image_size=28, patch_size=14)
PIXTRAL = PixtralVisionConfig(**VISION, image_size=28, patch_size=14, head_dim=8)
TEXT = families.SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 384}
CONFIGS = {
    Gemma3ForCausalLM: Gemma3Config(text_config=Gemma3TextConfig(**TEXT), vision_config=SIGLIP, mm_tokens_per_image=4),
    MistralForCausalLM: Mistral3Config(text_config=MistralConfig(**TEXT), vision_config=PIXTRAL),
}


def built(inner: type[PreTrainedModel] = Gemma3ForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIGS[inner]).float().eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.fixture(params=CONFIGS)
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    built(request.param).save_pretrained(tmp_path / "whole")
    tiny.tokenizer().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("inner", CONFIGS)
def test_it_computes_what_the_whole_model_does(tmp_path: Path, inner: type[PreTrainedModel]) -> None:
    whole = built(inner)
    expected, ids = logits(whole), torch.arange(3, 15)[None]
    continued = whole.generate(ids, max_new_tokens=4, do_sample=False)
    text = text_model(whole)
    assert type(text) is inner
    assert not text.training
    assert torch.equal(logits(text), expected)
    assert torch.equal(text.generate(ids, max_new_tokens=4, do_sample=False), continued)
    text.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is inner
    assert torch.equal(logits(again), expected)


def test_a_model_of_text_is_itself() -> None:
    model = tiny.model()
    assert text_model(model) is model


def test_its_pruned_export_is_a_model_of_text(tmp_path: Path, folder: Path) -> None:
    text = load_model(str(folder), dtype="float32")
    assert text.name_or_path == str(folder)
    space = build_space(discover(text), "width", uniform=False, round_to=1)
    attach(text, space).set_masks(random_masks(space))
    export(text, tmp_path / "pruned")
    torch.testing.assert_close(logits(load(tmp_path / "pruned")), logits(text))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_it_stays_so(folder: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    text = load_model(str(folder), dtype="float32", bits=bits)
    assert text.is_quantized
    assert text.hf_quantizer.quantization_config is not None
    assert "quantization_config" in text.config.to_dict()
    assert is_quantised(text.model.layers[0].mlp.up_proj)


def test_commands_take_the_text_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    size = load_model(str(folder)).num_parameters()
    assert f"{size:,}" in capsys.readouterr().out
    data = tiny.jsonl(folder.parent / "rows.jsonl", range(200))
    run = folder.parent / "run"
    settings = {
        "model.name_or_path": folder,
        "model.dtype": "float32",
        "data.train": data,
        "data.packing": False,
        "atp.round_to": 1,
        "training.use_cpu": True,
        "training.max_steps": 4,
        "training.bf16": False,
        "output_dir": run,
    }
    (folder.parent / "recipe.yaml").write_text("{}")
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", str(folder.parent / "recipe.yaml"), *words]) == 0
    assert load(run / "pruned").num_parameters() < size


def test_the_whole_model_is_refused_and_told_of_its_text_part() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Gemma3ForConditionalGeneration .* atp\.text_model\(model\)"):
        discover(built())


def test_adapters_come_after() -> None:
    with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM: take the text part of the model that LoRA"):
        text_model(families.with_lora(built()))


def test_text_parts_that_are_no_causal_lm_are_refused_by_name() -> None:
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    with pytest.raises(UnsupportedModelError, match="its text part, 'qwen2_5_vl_text', is no causal language model"):
        text_model(whole)
