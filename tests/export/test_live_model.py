"""The live model before and after export, and adapters of every kind.

Oracle: bitwise snapshots of the live model; its own masked logits.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from atp.errors import UnsupportedModelError
from atp.export import export, load
from atp.layers import attachment_of
from tests import families
from tests.export.cases import SPACES, masked

ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.5},
    "head_and_embedding": {"target_modules": ["q_proj", "down_proj", "lm_head", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "some_tokens": {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [4, 5, 6]},
}


def _tuned(adapter: str, family: str = "llama_biases") -> torch.nn.Module:
    model = families.with_lora(families.build(family), **ADAPTERS[adapter])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_embedding", "modules_to_save", "token_adapter", "magnitude")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("adapter", ["head_and_embedding", "modules_to_save", "some_tokens"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_adapters_on_embeddings_that_are_scaled(adapter, family, tmp_path):
    """Gemma multiplies by the root of its own width, which changes with the stream's."""
    model = masked(_tuned(adapter, family), "hidden")
    loaded = load(export(model, tmp_path / "out")).eval()
    assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("space", SPACES)
def test_every_adapter_is_merged_and_the_live_model_is_untouched(adapter, space, tmp_path):
    model = masked(_tuned(adapter), space)
    expected, before = families.logits(model), _snapshot(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    decision = attachment_of(model).decision()
    model.train()
    loaded = load(export(model, tmp_path / "out")).eval()
    assert all(module.training for module in model.modules())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(mask, decision[name]) for name, mask in attachment_of(model).masks.items())
    assert torch.equal(families.logits(model.eval()), expected)
    assert families.relative_error(families.logits(loaded), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_head_with_an_adapter_of_its_own_is_untied(tmp_path):
    model = families.with_lora(families.build("llama_tied"), target_modules=["q_proj", "lm_head"])
    model = masked(model, "uniform")
    loaded = load(export(model, tmp_path / "out")).eval()
    assert loaded.config.tie_word_embeddings is False
    assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5


def test_a_disabled_adapter_is_left_out(tmp_path):
    model = masked(_tuned("lora"), "width")
    with model.disable_adapter():
        expected = families.logits(model)
        loaded = load(export(model, tmp_path / "out")).eval()
    assert families.relative_error(families.logits(loaded), expected) <= 1e-5


def test_an_adapter_merged_by_the_user_counts_once(tmp_path):
    model = masked(_tuned("lora"), "width")
    expected = families.logits(model)
    model.merge_adapter()
    loaded = load(export(model, tmp_path / "out")).eval()
    assert families.relative_error(families.logits(loaded), expected) <= 1e-5


def test_a_model_without_adapters_is_exported_alike(tmp_path):
    model = masked(families.build("qwen3"), "width")
    loaded = load(export(model, tmp_path / "out")).eval()
    assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5


@pytest.mark.parametrize("space", SPACES)
def test_bfloat16_stays_bfloat16(space, tmp_path):
    """Oracle: the same masked model in float32; the export may err a little more than the bfloat16 model itself."""
    model = masked(families.with_lora(families.build("llama").bfloat16()), space)
    expected_low = families.logits(model).float()
    folder = export(model, tmp_path / "out")
    loaded = load(folder, dtype="auto").eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    expected = families.logits(model.float())
    allowed = families.relative_error(expected_low, expected) + 1e-2
    assert families.relative_error(families.logits(loaded).float(), expected) <= allowed


def test_masks_may_be_given(tmp_path):
    model = masked(_tuned("lora"), "width")
    everything = attachment_of(model).space.full()
    loaded = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "out", masks=everything)).eval()
    attachment_of(model).set_masks(everything)
    assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5
    assert loaded.config.atp["sparsity"] == 0


def test_an_adapter_that_cannot_be_merged_is_named(tmp_path):
    model = masked(_tuned("lora"), "width")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.lora_B["default"].weight.data = torch.zeros(3, 3)
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        export(model, tmp_path / "out")
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not list(tmp_path.iterdir())
