"""Files: whole or absent, clear when the folder is damaged, and made a tensor at a time.

Oracle: the file system before the call; the folder's own tensors; transformers reading the file back.
"""

import errno
import importlib
import json
import sys
import weakref

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig

from atp.errors import ATPError, CheckpointError, UnsupportedModelError
from atp.export.gguf import write_gguf
from atp.export.gguf.source import Source
from tests import families
from tests.export.gguf.cases import folder, save
from tests.families import _family, relative_error

SCALE = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
READ_BACK = {
    "llama": _family("Llama"),
    "llama_tied": _family("Llama", tie_word_embeddings=True),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", **SCALE | {"head_dim": 128}),
    "phi3": _family("Phi3"),
    "stablelm": _family("StableLm", use_qkv_bias=True),
    "starcoder2": _family("Starcoder2", use_bias=True, sliding_window=None),
    "gemma2": _family("Gemma2", **SCALE, sliding_window=6),
    "gemma3": _family("Gemma3Text", **SCALE, sliding_window=6, num_hidden_layers=6),
}
"""Families that transformers reads; of Qwen3's and Gemma's heads it knows the usual sizes only, `deci` not at all."""


@pytest.fixture
def made(tmp_path):
    return save(families.build("llama"), tmp_path / "hf")


@pytest.mark.parametrize("case", READ_BACK)
def test_transformers_reads_it_back(case, tmp_path):
    made = save(families.from_config(READ_BACK[case]()), tmp_path / "hf")
    write_gguf(made.path, tmp_path / "m.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert relative_error(families.logits(read.eval()), families.logits(made.model)) < 1e-5


def test_pruned_llamas_are_read_back(tmp_path):
    made = folder("llama", "uniform")
    write_gguf(made.path, tmp_path / "m.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert relative_error(families.logits(read.eval()), families.logits(made.model)) < 1e-5


@pytest.mark.parametrize(("dtype", "matrices"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_types_of_tensors(dtype, matrices, tmp_path):
    made = save(
        families.from_config(_family("Llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)()), tmp_path
    )
    reader = gguf.GGUFReader(write_gguf(tmp_path, tmp_path / "m.gguf", dtype))
    stored = made.model.state_dict()
    for tensor in reader.tensors:
        odd = dtype == "q8_0" and tensor.shape[0] % 32
        expected = "F32" if len(tensor.shape) == 1 else "F16" if odd else matrices
        assert tensor.tensor_type.name == expected, tensor.name
    first = reader.get_tensor(0)
    value = torch.tensor(gguf.quants.dequantize(first.data, first.tensor_type))
    assert relative_error(value, stored["model.embed_tokens.weight"]) < {"f32": 1e-9, "q8_0": 1e-2}.get(dtype, 4e-3)
    assert reader.get_field("general.quantization_version").contents() == 2


def test_the_model_card_s_licence_goes_along(made, tmp_path):
    (made.path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n")
    reader = gguf.GGUFReader(write_gguf(made.path, tmp_path / "m.gguf"))
    assert reader.get_field("general.license").contents() == "apache-2.0"


def test_what_was_pruned_is_said(tmp_path):
    made = folder("llama", "width")
    reader = gguf.GGUFReader(write_gguf(made.path, tmp_path / "m.gguf"))
    assert reader.get_field("general.architecture").contents() == "deci"
    kept = made.model.config.atp["blocks"]["kept"]
    assert reader.get_field("deci.attention.head_count_kv").contents() == kept["kv"]
    assert reader.get_field("deci.feed_forward_length").contents() == kept["mlp"]
    assert reader.get_field("atp.space").contents() == "width"
    assert reader.get_field("atp.sparsity").contents() == pytest.approx(made.model.config.atp["sparsity"])


def test_a_sliding_window_that_llama_cpp_has_not_bounds_the_context(tmp_path):
    save(families.build("mistral"), tmp_path)
    reader = gguf.GGUFReader(write_gguf(tmp_path, tmp_path / "m.gguf"))
    assert reader.get_field("llama.context_length").contents() == 6


def test_one_tensor_at_a_time(made, tmp_path, monkeypatch):
    seen, real = [], Source.tensor

    def tensor(self: Source, name: str) -> torch.Tensor:
        assert all(earlier() is None for earlier in seen), name
        value = real(self, name)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Source, "tensor", tensor)
    write_gguf(made.path, tmp_path / "m.gguf")
    assert len(seen) == len(made.model.state_dict())


def test_disp_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'disp'.*residual stream.*uniform=True"):
        write_gguf(folder("llama", "disp").path, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_values_of_fewer_dimensions_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'values'.*all blocks have as many dimensions.*uniform=True"):
        write_gguf(folder("llama", "values").path, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("Cohere", {}, "cohere: no GGUF of this family"),
        ("Llama", {"hidden_act": "relu"}, "no activation 'relu'"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "every fourth block"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2, "tie_word_embeddings": True}, "one block in 2"),
        ("Gemma2", {"tie_word_embeddings": False}, "head from the embedding"),
        ("Gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 0.0}, "always caps logits"),
        ("StableLm", {"qk_layernorm": True}, "qk_layernorm"),
        ("Starcoder2", {"use_bias": False}, "needs a bias"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(family, changes, words, tmp_path):
    save(families.from_config(_family(family, **changes)()), tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        write_gguf(tmp_path / "hf", tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_an_unknown_dtype_is_said(made, tmp_path):
    with pytest.raises(ATPError, match="'q4_0' is unknown: it must be one of f32, f16, bf16, q8_0"):
        write_gguf(made.path, tmp_path / "m.gguf", "q4_0")


def test_an_existing_file_is_an_error_unless_overwritten(made, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(ATPError, match="exists"):
        write_gguf(made.path, out)
    assert out.read_text() == "mine"
    write_gguf(made.path, out, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_no_tokenizer_is_said(made, tmp_path):
    (made.path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json.*save_pretrained"):
        write_gguf(made.path, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_truncated_weights_are_said(made, tmp_path, keep):
    weights = made.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="export the model again") as caught:
        write_gguf(made.path, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "nothing"}'])
def test_an_unreadable_config_is_said(made, tmp_path, text):
    (made.path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        write_gguf(made.path, tmp_path / "m.gguf")


def test_sizes_that_disagree_are_named(made, tmp_path):
    values = json.loads((made.path / "config.json").read_text())
    (made.path / "config.json").write_text(json.dumps(values | {"intermediate_size": 41}))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(40, 48\) where config\.json says \(41"):
        write_gguf(made.path, tmp_path / "m.gguf")


def test_a_missing_tensor_is_named(made, tmp_path):
    tensors = load_file(made.path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, made.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
        write_gguf(made.path, tmp_path / "m.gguf")


def test_an_index_does_not_lead_out_of_the_folder(made, tmp_path):
    (made.path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(made.model.state_dict(), "../elsewhere.safetensors")}
    (made.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is no weight file of this folder"):
        write_gguf(made.path, tmp_path / "m.gguf")


def test_shards_are_read(made, tmp_path):
    whole = write_gguf(made.path, tmp_path / "a.gguf").read_bytes()
    made.model.save_pretrained(made.path, max_shard_size="20KB")
    (made.path / "model.safetensors").unlink(missing_ok=True)
    assert write_gguf(made.path, tmp_path / "b.gguf").read_bytes() == whole


def test_values_too_large_for_f16_are_said(made, tmp_path):
    tensors = load_file(made.path / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, made.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight.*too large for f16: write bf16 or f32"):
        write_gguf(made.path, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    write_gguf(made.path, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk_or_an_interrupt_leaves_nothing_behind(made, tmp_path, monkeypatch, error, old):
    out, calls, real = tmp_path / "m.gguf", [], gguf.GGUFWriter.write_tensor_data
    if old:
        out.write_text("mine")

    def failing(self, tensor: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise error
        real(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        write_gguf(made.path, out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["hf", "m.gguf"] if old else ["hf"])
    assert not old or out.read_text() == "mine"


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    room = sys.modules["atp.export"]
    monkeypatch.setattr(room, "gguf", room.gguf)  # importing it again replaces that
    for name in [name for name in sys.modules if name.startswith("atp.export.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ATPError, match=r"pip install 'atp\[gguf\]'"):
        importlib.import_module("atp.export.gguf").write_gguf("a", "b")
