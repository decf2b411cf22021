"""The pruned base and the LoRA beside it.

Oracle: the live masked float32 model's logits, and its state dict before; `export` for what merging must give.
"""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from atp.errors import ATPError, UnsupportedModelError
from atp.export import export_adapter, load
from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import base_layer
from tests import families, tiny
from tests.export import cases
from tests.export.cases import masked
from tests.export.test_live_model import ADAPTERS, _tuned

CASES = [(f, s) for f, s in cases.CASES if s not in ("uniform", "blocks") or f in ("llama", "olmo2", "gpt_neox")]
every_case = pytest.mark.parametrize(("family", "space"), CASES)


def opened(folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()


@every_case
def test_adapter_on_base_and_both_merged_compute_what_the_masked_model_does(family, space, tmp_path):
    model = masked(families.with_lora(families.build(family)), space)
    expected = families.logits(model)
    tuned = opened(export_adapter(model, tmp_path / "out"))
    assert families.relative_error(families.logits(tuned), expected) <= 1e-5
    with tuned.disable_adapter():
        assert families.relative_error(families.logits(tuned), expected) > 1e-2
    assert families.relative_error(families.logits(tuned.merge_and_unload()), expected) <= 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama_biases", "olmo2"])
@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_every_kind_of_lora_is_carried(adapter, family, tmp_path):
    model = masked(_tuned(adapter, family), "width")
    expected, before = families.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    folder = export_adapter(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert families.relative_error(families.logits(opened(folder)), expected) <= 1e-5


def test_ranks_and_scales_of_their_own_are_carried(tmp_path):
    model = families.with_lora(
        families.build("llama"), rank_pattern={"q_proj": 7}, alpha_pattern={"down_proj": 31}, use_rslora=True
    )
    model = masked(model, "width")
    tuned = opened(export_adapter(model, tmp_path / "out"))
    assert families.relative_error(families.logits(tuned), families.logits(model)) <= 1e-5
    assert {module.r["default"] for module in tuned.modules() if hasattr(module, "lora_A")} == {4, 7}


LAYERS = {
    "ranks": {"rank_pattern": {r"layers\.2\..*q_proj": 7, "down_proj": 3}},
    "scales": {"alpha_pattern": {r"layers\.3\.mlp\.up_proj": 31}},
    "some_blocks": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2, 3]},
    "expression": {"target_modules": r".*layers\.[23]\..*(q|down)_proj"},
    "paths": {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.3.self_attn.v_proj"]},
}


@pytest.mark.parametrize("settings", LAYERS)
def test_settings_that_name_blocks_are_carried_where_blocks_went(settings, tmp_path):
    model = families.with_lora(tiny.model(), **LAYERS[settings])
    attachment = attach(model, build_space(discover(model), "depth", uniform=True))
    attachment.set_masks(attachment.space.full() | {"1.whole_block": torch.zeros(1)})
    tuned = opened(export_adapter(model, tmp_path / "out"))
    assert tuned.config.num_hidden_layers == 3
    assert families.relative_error(families.logits(tuned), families.logits(model)) <= 1e-5


@pytest.mark.parametrize("adapter", ["head_and_embedding", "modules_to_save", "some_tokens"])
def test_what_lies_on_the_embedding_or_head_is_not_cut_with_the_stream(adapter, tmp_path):
    model = masked(_tuned(adapter), "hidden")
    with pytest.raises(UnsupportedModelError, match="cannot be cut with the residual stream"):
        export_adapter(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_base_holds_what_the_live_base_was_changed_to(tmp_path):
    model = masked(families.with_lora(families.build("llama")), "width")
    with torch.no_grad():
        base_layer(model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")).weight.mul_(2.0)
    folder = export_adapter(model, tmp_path / "out")
    assert families.relative_error(families.logits(opened(folder)), families.logits(model)) <= 1e-5


def test_one_base_carries_a_second_adapter(tmp_path):
    model = masked(families.with_lora(families.build("llama")), "width")
    folder = export_adapter(model, tmp_path / "out")
    other = get_peft_model(load(folder / "base"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = families.tokens()
    other(input_ids=batch, labels=batch).loss.backward()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    second = families.logits(other.eval())
    other.save_pretrained(tmp_path / "second")
    both = opened(folder)
    both.load_adapter(tmp_path / "second", "second")
    assert families.relative_error(families.logits(both), families.logits(model)) <= 1e-5
    both.set_adapter("second")
    assert families.relative_error(families.logits(both), second) <= 1e-5


def test_peft_finds_the_base_from_any_folder(tmp_path, monkeypatch):
    model = masked(families.with_lora(families.build("llama")), "width")
    folder = export_adapter(model, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    assert families.relative_error(families.logits(tuned), families.logits(model)) <= 1e-5
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")


def test_adapters_that_change_the_base_are_refused_by_name(tmp_path):
    model = masked(families.with_lora(families.build("llama_biases"), bias="all"), "width")
    with pytest.raises(UnsupportedModelError, match="bias='all'.*format hf"):
        export_adapter(model, tmp_path / "out")
    ia3 = get_peft_model(families.build("llama"), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="IA3Config, not LoRA"):
        export_adapter(ia3, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="has no adapter"):
        export_adapter(masked(families.build("llama"), "width"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_the_one_in_force_is_refused(tmp_path):
    model = masked(families.with_lora(families.build("llama")), "width")
    with model.disable_adapter(), pytest.raises(UnsupportedModelError, match="adapters are disabled"):
        export_adapter(model, tmp_path / "out")
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"q_proj: the adapter is merged: call model\.unmerge_adapter"):
        export_adapter(model, tmp_path / "out")
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedModelError, match=r"2 adapters are active \(default, second\)"):
        export_adapter(model, tmp_path / "out")


def test_an_existing_folder_stays(tmp_path):
    model = masked(families.with_lora(families.build("llama")), "width")
    (tmp_path / "out").mkdir()
    with pytest.raises(ATPError, match="exists"):
        export_adapter(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    export_adapter(model, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_trained_whole_of_a_pruned_layer_is_refused(tmp_path):
    model = families.build("llama")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["down_proj"], task_type="CAUSAL_LM")
    model = masked(get_peft_model(model, config), "width")
    with pytest.raises(UnsupportedModelError, match=r"down_proj.*format hf"):
        export_adapter(model, tmp_path / "out")
