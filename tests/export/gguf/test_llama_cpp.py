"""llama.cpp opens what is written and computes the same.

Oracle: transformers in float32 on the same folder. In f32 log-probabilities agree to 1e-5, or 2e-4 where llama.cpp has
GELU from a float16 table. In 16 bits it rounds what enters a matrix too, so that tokens may part where two are close.
"""

from pathlib import Path

import pytest
import torch

from atp.errors import UnsupportedModelError
from atp.export import export, load
from atp.export.gguf import write_gguf
from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import masked
from tests.export.gguf.cases import CASES, RAGGED, Folder, clear_steps, folder, greedy, save, tokenizer
from tests.export.gguf.llama_cpp import LlamaCpp
from tests.families import _family, relative_error

STEPS = 8
GELU = ("gemma2", "gemma3", "starcoder2", "gpt_neox", "gpt_neox_serial")
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def agree(made: Folder, path: Path, tolerance: float = 1e-5, margin: float = 0.0, seeds: int = 1) -> None:
    """Greedy tokens equal, but after two that are closer than `margin`; log-probabilities within `tolerance`."""
    llama_cpp = LlamaCpp(path, families.VOCABULARY)
    for seed in range(seeds):
        prompt = families.tokens(1, 12, seed)[0].tolist()
        expected, rows = greedy(made.model, prompt, STEPS)
        actual = llama_cpp.generate(prompt, STEPS)
        clear = clear_steps(rows, margin)
        assert actual.tokens[:clear] == expected[:clear]
        same = next((i for i in range(STEPS) if actual.tokens[i] != expected[i]), STEPS - 1) + 1
        assert relative_error(actual.log_probabilities[:same], rows[:same]) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_equal_blocks_under_the_family_s_architecture(case, tmp_path):
    made = folder(case, "uniform")
    agree(made, write_gguf(made.path, tmp_path / "m.gguf", "f32"), 2e-4 if case in GELU else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_unequal_blocks_as_deci_or_refused(case, tmp_path):
    made = folder(case, "width")
    if case in RAGGED:
        agree(made, write_gguf(made.path, tmp_path / "m.gguf", "f32"))
        return
    with pytest.raises(UnsupportedModelError, match="uniform=True"):
        write_gguf(made.path, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "space", "why"),
    [
        *((case, "hidden", None) for case in ("llama_tied", "mistral", "qwen3", "gemma2", "gemma3")),
        *((case, "blocks", None) for case in ("llama", "qwen2", "gemma2", "phi3", "stablelm", "gpt_neox", "granite")),
        ("llama", "all", None),
        ("gemma3", "blocks", "layer_types"),
        ("olmo2", "hidden", "has no other hidden size than heads x head size"),
    ],
)
def test_fewer_dimensions_of_the_stream_and_fewer_blocks(case, space, why, tmp_path):
    made = folder(case, space)
    if why is not None:
        with pytest.raises(UnsupportedModelError, match=why):
            write_gguf(made.path, tmp_path / "m.gguf")
        return
    agree(made, write_gguf(made.path, tmp_path / "m.gguf", "f32"), 2e-4 if case in GELU else 1e-5)


@pytest.mark.parametrize("space", ["uniform", "width"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2)])
def test_fewer_bits(dtype, tolerance, space, tmp_path):
    config = _family("Llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    model = masked(families.with_lora(families.from_config(config())), space)
    path = export(model, tmp_path / "hf", processing_class=tokenizer())
    file = write_gguf(path, tmp_path / "m.gguf", dtype)
    agree(Folder(path, load(path).eval()), file, tolerance, margin=10 * tolerance, seeds=4)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_rotations(family, rope, tmp_path):
    made = save(families.from_config(_family(family, rope_parameters=ROPES[rope] | {"rope_theta": 1e4})()), tmp_path)
    if (family, rope) == ("Qwen2", "llama3"):
        with pytest.raises(UnsupportedModelError, match="llama3"):
            write_gguf(made.path, tmp_path / "m.gguf")
    else:
        agree(made, write_gguf(made.path, tmp_path / "m.gguf", "f32"))


@pytest.mark.parametrize("family", ["Phi3", "StableLm", "GPTNeoX"])
def test_a_part_of_each_head_rotated(family, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None if family == "GPTNeoX" else 2}
    made = save(families.from_config(_family(family, **sizes, rope_parameters=rope)()), tmp_path)
    agree(made, write_gguf(made.path, tmp_path / "m.gguf", "f32"), 2e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_biases_that_stand_in_for_what_was_pruned(family, tmp_path):
    """Where the family has none: `deci` takes them."""
    model = families.from_config(_family(family)())
    attach(model, space := build_space(discover(model), "width", uniform=True))
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    path = export(model, tmp_path / "hf", masks=space.full(), processing_class=tokenizer())
    if family == "Qwen3":
        with pytest.raises(UnsupportedModelError, match="compensate"):
            write_gguf(path, tmp_path / "m.gguf")
    else:
        agree(Folder(path, load(path).eval()), write_gguf(path, tmp_path / "m.gguf", "f32"))


LOST = ({1: "mlp", 3: "attention mlp", 5: "mlp"}, {2: "attention", 5: "attention"}, {1: "mlp", 5: "attention mlp"})


LOSING = {
    "llama": _family("Llama", num_hidden_layers=6),
    "llama_biases": _family("Llama", num_hidden_layers=6, attention_bias=True, mlp_bias=True),
    "qwen2": _family("Qwen2", num_hidden_layers=6),
    "phi3": _family("Phi3", num_hidden_layers=6),
}


@pytest.mark.parametrize("lost", LOST, ids=str)
@pytest.mark.parametrize("case", LOSING)
def test_blocks_that_lost_a_half_or_both(case, lost, tmp_path):
    model = families.from_config(LOSING[case]())
    attach(model, space := build_space(discover(model), "width+depth"))
    masks = space.full()
    for block in range(6):
        masks[f"{block}.mlp"][10 + block :] = 0
        for half in lost.get(block, "").split():
            masks[f"{block}.whole_{half}"][:] = 0
    path = export(model, tmp_path / "hf", masks=masks, processing_class=tokenizer())
    agree(Folder(path, load(path).eval()), write_gguf(path, tmp_path / "m.gguf", "f32"))
