"""vLLM: the plugin's own parts everywhere; ragged, `disp` and plain folders served where vLLM is installed.

Oracle: the exported model in transformers: its hidden states, its head counts, its greedy tokens.
"""

import json
import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from atp.export import export, load
from atp.export.layout import empty_model
from atp.layers import attach
from atp.serving.blocks import block_configs, headless_class
from atp.serving.vllm import MODEL_CLASS, register
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import CASES, SPACES, exported, masked

every_case = pytest.mark.parametrize(("family", "space"), [(f, s) for f, s in CASES if s in ("width", "disp")])


@every_case
def test_block_configs_have_the_heads_of_the_exported_blocks(family, space):
    model = exported(family, space).loaded
    layout = model.config.atp["blocks"]
    attentions = [block.get_submodule(layout["attention"]) for block in model.get_submodule(layout["container"])]
    for config, attention in zip(block_configs(model.config), attentions, strict=True):
        writer = next(m for name, m in attention.named_children() if name in ("o_proj", "dense"))
        assert config.num_attention_heads * config.head_dim == writer.in_features
        if space == "width":
            assert config.num_key_value_heads in layout["kept"]["kv"]


@every_case
def test_the_headless_model_computes_the_same_hidden_states(family, space):
    model = exported(family, space).loaded
    headless = headless_class(type(model.config))(model.config).eval()
    headless.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        expected = model.base_model(input_ids=families.tokens()).last_hidden_state
        assert torch.equal(headless(input_ids=families.tokens()).last_hidden_state, expected)


def test_values_of_fewer_dimensions_are_refused():
    with pytest.raises(ValueError, match="values have fewer dimensions than keys, which vLLM has no place for"):
        block_configs(exported("llama", "values").loaded.config)


def test_an_attention_that_is_gone_is_refused_by_name():
    model = families.build("llama")
    attachment = attach(model, build_space(discover(model), "depth"))
    attachment.set_masks(attachment.space.full() | {"1.whole_attention": torch.zeros(1)})
    config = empty_model(model, attachment.space, attachment.decision()).config
    with pytest.raises(ValueError, match="block 1 has no attention, which vLLM has no place for"):
        block_configs(config)


def test_the_entry_point_names_the_plugin():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"atp": f"{register.__module__}:{register.__name__}"}
    assert (Path(__file__).parents[2] / (MODEL_CLASS.split(":")[0].replace(".", "/") + ".py")).exists()


def fake_vllm(monkeypatch, fields: dict) -> tuple[dict, dict]:
    """Modules as `register` imports them; what it registers of convertors and models."""
    convertors, models = {}, {}
    architecture = SimpleNamespace(ModelArchitectureConfig=SimpleNamespace(__dataclass_fields__=fields))
    convertor = SimpleNamespace(MODEL_ARCH_CONFIG_CONVERTORS=convertors, ModelArchConfigConvertorBase=object)
    contents = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=models.__setitem__)},
        "vllm.config": {},
        "vllm.config.model_arch": vars(architecture),
        "vllm.transformers_utils": {"model_arch_config_convertor": convertor},
        "vllm.transformers_utils.model_arch_config_convertor": vars(convertor),
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return convertors, models


def test_registering_names_the_families_of_the_table_and_imports_no_model(monkeypatch):
    convertors, models = fake_vllm(monkeypatch, {"per_layer_overrides": None})
    for _ in range(2):
        register()
    assert models == {f"Pruned{type(families.build(family)).__name__}": MODEL_CLASS for family in families.FAMILIES}
    config = exported("llama", "width").loaded.config
    told = convertors["atp"].get_per_layer_hf_configs(SimpleNamespace(hf_config=config))
    assert [own.num_key_value_heads for own, _ in told] == config.atp["blocks"]["kept"]["kv"]
    assert MODEL_CLASS.split(":")[0] not in sys.modules


def test_a_vllm_without_sizes_per_block_is_warned_about_and_goes_on(monkeypatch, caplog):
    convertors, models = fake_vllm(monkeypatch, {})
    register()
    assert (convertors, models) == ({}, {})
    assert "0.30 or newer" in caplog.text


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True, max_num_seqs=4)
settings = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("vllm") is None, reason="needs vllm: pip install vllm, and atp itself for its entry point"
)
@pytest.mark.parametrize("space", [space for space in SPACES if space != "values"])
def test_vllm_generates_the_tokens_of_transformers(space, tmp_path):
    """Heads of 32, which all of vLLM's kernels have."""
    torch.manual_seed(0)
    sizes = families.SIZES | {"hidden_size": 192, "intermediate_size": 256}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32)
    folder = export(masked(families.with_lora(model), space), tmp_path / "out")
    prompts, alone = [families.tokens()[0, :9], families.tokens()[1, :4]], load(folder).eval()
    expected = [
        alone.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=6, eos_token_id=None)[0]
        for p in prompts
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVE, str(folder), json.dumps([p.tolist() for p in prompts])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = next(line for line in done.stdout.splitlines() if "TOKENS" in line)
    tokens = json.loads(found.split("TOKENS ")[1])
    assert tokens == [row[len(p) :].tolist() for row, p in zip(expected, prompts, strict=True)]
