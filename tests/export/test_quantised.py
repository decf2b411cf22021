"""Quantised base layers, where bitsandbytes is installed.

Oracle: the live masked model's logits in training mode; in evaluation mode these kernels round activations too.
"""

import json

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from atp.cli import main
from atp.commands.datasets import load_data
from atp.criteria import scores
from atp.errors import UnsupportedModelError
from atp.evaluation import count_parameters, perplexity
from atp.export import export, export_adapter, load
from atp.layers import attach
from atp.loading import load_dense
from atp.recipe import Recipe
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import base_layer, causal_lm, dequantised_weight
from tests import families, tiny
from tests.export.cases import SPACES, masked

pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
PATH = "model.layers.1.mlp.up_proj"
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


def test_weights_stay_as_they_are_stored_in_evaluation_mode(quantised, tmp_path):
    """On a CPU with bfloat16 arithmetic bitsandbytes repacks them there, and what dequantises them is then wrong."""
    model = quantised(NF4)
    before = dequantised_weight(base_layer(causal_lm(model).get_submodule(PATH)))
    model = masked(model, "width")
    families.logits(model.eval())
    assert torch.equal(dequantised_weight(base_layer(causal_lm(model).get_submodule(PATH))), before)
    expected = families.logits(model.train())
    assert families.relative_error(families.logits(load(export(model, tmp_path / "out")).eval()), expected) <= 1e-5


def test_weights_that_have_been_repacked_are_refused(quantised):
    model = quantised(NF4)
    space = build_space(discover(model), "width")
    families.logits(model.eval())
    if not base_layer(causal_lm(model).get_submodule(PATH)).weight.quant_state.packing_format_for_cpu:
        pytest.skip("nothing is repacked on this machine")
    with pytest.raises(UnsupportedModelError, match="load the model anew"):
        attach(model, space)


def test_packed_parameters_count_for_what_they_hold(quantised):
    model = quantised(NF4).get_base_model()
    sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p.numel() for m in model.modules() if not isinstance(m, torch.nn.Linear) for p in m.parameters(False)]
    assert count_parameters(model) == sum(sizes) + sum(others)


@pytest.mark.parametrize("pruned", [True, False])
def test_a_recipe_of_four_bits_from_the_base_to_its_results(tmp_path, pruned):
    """What is measured, before and after, is what was trained."""
    rows = [str(tiny.jsonl(tmp_path / f"{name}.jsonl", r)) for name, r in (("a", range(60)), ("b", range(60, 70)))]
    recipe = {
        "model": {"name_or_path": str(tiny.folder(tmp_path / "base")), "dtype": "float32", "load_in_4bit": True},
        "data": {"train": rows[0], "validation": rows[1], "max_length": 16},
        "lora": {"r": 4},
        "atp": {"sparsity": 0.4, "calibration_rows": 4, "calibration_batch_size": 2} if pruned else False,
        "training": {"max_steps": 4, "learning_rate": 1.0e-2, "save_strategy": "no", "disable_tqdm": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["base"]["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    run = tmp_path / "run"
    held_out = load_data(Recipe.from_yaml(run / "recipe.yaml").data, tiny.tokenizer(), progress=False).validation
    again = perplexity(load(run / "pruned") if pruned else load_dense(run), held_out)
    assert found["validation"]["nll"] == pytest.approx(again.nll, rel=1e-5)
