"""Quantised base layers, where bitsandbytes is installed.

Oracle: the live masked model's logits in training mode; in evaluation mode these kernels round activations too.
"""

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from atp.criteria import scores
from atp.errors import UnsupportedModelError
from atp.export import export, export_adapter, load
from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import SPACES, masked

pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS = {"nf4": NF4, "int8": {"load_in_8bit": True}}


@pytest.fixture
def quantised(tmp_path):
    """A builder of a small quantised Llama under LoRA; sizes are multiples of what the kernels ask for."""
    sizes = families.SIZES | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "base")

    def build(settings: dict, **lora: object) -> torch.nn.Module:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.float32
        )
        return families.with_lora(loaded, **lora).train()

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_quantised_layers_are_dequantised_and_left_as_they_were(quantised, kind, space, tmp_path):

    model = masked(quantised(KINDS[kind]), space)
    expected = families.logits(model)
    loaded = load(export(model, tmp_path / "out")).eval()
    assert torch.equal(families.logits(model), expected)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert "quantization_config" not in loaded.config.to_dict()
    assert families.relative_error(families.logits(loaded), expected) <= 1e-5


def test_dora_on_a_quantised_layer_is_refused_by_name(quantised, tmp_path):
    model = masked(quantised(NF4, use_dora=True), "width")
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.q_proj.*unquantised"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_weights_leaves_the_live_model_as_it_was(quantised, kind):
    model = quantised(KINDS[kind])
    space = build_space(discover(model), "width")
    attachment = attach(model, space)
    expected = families.logits(model)
    scores.magnitude(space, attachment.modules)
    assert torch.equal(families.logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_quantised_layers_comes_with_an_unquantised_base(quantised, kind, tmp_path):
    model = masked(quantised(KINDS[kind]), "width")
    expected = families.logits(model)
    folder = export_adapter(model, tmp_path / "out")
    tuned = PeftModel.from_pretrained(load(folder / "base"), folder / "adapter").eval()
    assert families.relative_error(families.logits(tuned), expected) <= 1e-5
