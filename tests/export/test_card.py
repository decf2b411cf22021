"""Model cards of exported folders.

Oracle: `huggingface_hub` reads the front matter back; the folder's config for the numbers; the code blocks are run.
"""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from atp.export import About, Result, export, export_adapter, load, provenance
from atp.export.card import write_rotated_card
from atp.export.provenance import origin_of
from atp.layers import attachment_of
from tests import families, tiny
from tests.export.cases import SPACES, exported, masked
from tests.export.gguf import cases as gguf_cases


def tuned(space, name=""):
    model = families.with_lora(families.build("llama"))
    model.get_base_model().name_or_path = str(name)
    return masked(model, space)


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    assert str(card).startswith("---\n")
    return card


@pytest.mark.parametrize(("family", "space", "possible"), [("gemma3", "width", False), ("gemma3", "uniform", True)])
def test_a_family_that_llama_cpp_has_no_uneven_blocks_of_is_told_so(family, space, possible):
    text = card_of(gguf_cases.folder(family, space).path).text
    assert ("--format gguf" in text) == possible
    assert ("its blocks have unequal sizes" in text) != possible


def test_a_plain_folder_that_llama_cpp_does_not_compute_is_told_why():
    text = card_of(exported("smollm3", "uniform").folder).text
    assert "--format gguf" not in text
    assert "not possible: smollm3: " in text


@pytest.mark.parametrize("space", SPACES)
def test_the_numbers_are_those_of_the_folder(space, tmp_path):
    folder = export(tuned(space), tmp_path / "out")
    card = card_of(folder)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    text = card.text
    before = families.build("llama").num_parameters()
    after = load(folder).num_parameters()
    assert f"| parameters | {after:,} of {before:,} ({100 * (1 - after / before):.1f} % fewer) |" in text
    plain = not (folder / "modeling_atp.py").exists()
    assert ("MLP channels, of each block" in text) == (space != "hidden")
    assert ("residual dimensions read by attention" in text) == (space == "disp")
    assert ("| residual dimensions |" in text) == (space in ("hidden", "all", "plainest"))
    assert ("| blocks |" in text) == (space in ("depth", "blocks", "all", "plainest"))
    assert ("trust_remote_code=True" in text) == ("import atp" in text) == (not plain)
    assert ("reads and writes a part of the residual stream" in text) == (space == "disp")
    gone = 0 in load(folder).config.atp.get("blocks", {}).get("kept", {}).get("kv", [])
    assert ("no attention, which vLLM has no place for" in text) == gone
    assert ("values have fewer dimensions than keys" in text) == (space == "values")
    assert ("dimensions of values, of each block" in text) == (space == "values")
    refused = {"disp": ["llama.cpp"], "values": ["llama.cpp", "vLLM"]}.get(space, [])
    assert text.count("not possible") == len(refused) + gone
    assert card.data.license is None
    assert card.data.base_model is None


@pytest.mark.parametrize("space", SPACES)
def test_its_code_loads_the_folder(space, tmp_path):
    folder = export(tuned(space), tmp_path / "out")
    (code,) = re.findall(r"```python\n(.+?)```", card_of(folder).text, re.S)
    assert "AutoTokenizer.from_pretrained" not in code  # none came along
    found = {}
    exec(code.replace("THIS_FOLDER", str(folder)), found)
    assert found["model"].config.atp["parameters"]["after"] == found["model"].num_parameters()


def test_licence_and_origin_are_the_bases_own(tmp_path):
    base = tmp_path / "secret" / "some-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nbase_model: someone/model\n---\n# x\n")
    card = card_of(export(tuned("uniform", base), tmp_path / "out"))
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "mine", "someone/model")
    assert "mine, as its card says" in card.text
    assert "# some-base, " in card.text
    assert "secret" not in str(card)


@pytest.mark.parametrize("readme", [None, "no front matter", "---\nlicense: [\n---\n", "---\nlicense: 7\n---\n"])
def test_a_base_that_states_no_licence_gives_none(readme, tmp_path):
    base = tmp_path / "some-base"
    base.mkdir()
    if readme is not None:
        (base / "README.md").write_text(readme)
    card = card_of(export(tuned("uniform", base), tmp_path / "out"))
    assert card.data.license is None
    assert "name none" in card.text


def test_what_the_run_knows_is_said(tmp_path):
    about = About(
        base=str(tmp_path / "gone" / "base"),
        data=("/home/me/rows.jsonl", "someone/corpus"),
        settings={"atp": {"sparsity": 0.4}},
        results=(Result("held-out.jsonl", "perplexity", 12.345678, "held out"), Result("mmlu", "accuracy", 0.5)),
    )
    card = card_of(export(tuned("width"), tmp_path / "out", about=about))
    assert card.data.datasets == ["someone/corpus"]
    results = [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert results == [("held-out.jsonl", "perplexity", 12.3457), ("mmlu", "accuracy", 0.5)]
    assert "| held-out.jsonl | perplexity | 12.35 | held out |" in card.text
    assert "`rows.jsonl`, `someone/corpus`" in card.text
    assert "/home/me" not in str(card)
    assert "sparsity: 0.4" in card.text


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    about = About(data=("/home/me/pubmedqa/train.jsonl", "/home/me/hqs/train.jsonl", "someone/corpus"))
    card = card_of(export(tuned("width"), tmp_path / "out", about=about))
    assert "Training text: `pubmedqa/train.jsonl`, `hqs/train.jsonl`, `someone/corpus`." in card.text
    assert "/home/me" not in str(card)


def test_a_base_for_adapters_and_its_adapter_have_cards_of_their_own(tmp_path):
    about = About(results=(Result("held-out.jsonl", "perplexity", 12.0),))
    folder = export_adapter(tuned("width"), tmp_path / "out", about=about)
    base, adapter = card_of(folder / "base"), card_of(folder / "adapter")
    assert (base.data.library_name, adapter.data.library_name) == ("transformers", "peft")
    assert base.data.eval_results is None  # of the base under its adapter
    assert adapter.data.eval_results[0].metric_value == 12.0
    assert "a base for adapters" in base.text
    (code,) = re.findall(r"```python\n(.+?)```", adapter.text, re.S)
    found = {}
    exec(code.replace('"base"', f'"{folder}/base"').replace('"adapter"', f'"{folder}/adapter"'), found)
    assert found["model"].peft_config


def test_what_was_pruned_twice_says_both(tmp_path):
    first = export(tuned("uniform", tmp_path / "some-base"), tmp_path / "pruned")
    model = masked(families.with_lora(load(first)), "width", 0.2)
    text = card_of(export(model, tmp_path / "out")).text
    assert re.search(r"^# some-base, 5\d\.\d % pruned$", text, re.M)
    assert re.search(r"\| pruned in \| 4\d\.\d % \(`width`\), then 20\.\d % \(`width`\) \|", text)


def test_a_gguf_base_states_its_licence(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install 'atp[gguf]'")
    writer = gguf.GGUFWriter(tmp_path / "Some-Model-F16.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    about = About(base=str(tmp_path), gguf_file="Some-Model-F16.gguf")
    card = card_of(export(tuned("uniform"), tmp_path / "out", about=about))
    assert card.data.license == "apache-2.0"
    assert "apache-2.0, as `Some-Model-F16.gguf` says" in card.text
    assert "# Some-Model-F16, " in card.text


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_model_is_asked_for_its_licence_once(answers, tmp_path, monkeypatch):
    asked = []

    def model_info(name, timeout):
        asked.append((name, timeout))
        if not answers:
            raise ConnectionError("no network")
        return SimpleNamespace(card_data=ModelCardData(license="mit"))

    monkeypatch.setattr(provenance, "model_info", model_info)
    monkeypatch.setattr(provenance.constants, "HF_HUB_OFFLINE", False)
    name = f"someone/model-{answers}"
    for number in range(2):
        card = card_of(export(tuned("uniform", name), tmp_path / str(number)))
    assert (card.data.base_model, card.data.license) == (name, "mit" if answers else None)
    assert asked == [(name, 3.0)]
    assert f"# {name}, " in card.text


def test_what_vllm_gets_wrong_is_said(tmp_path):
    heads, channels = {"0.kv": 2, "1.kv": 2}, {"0.kv": 3, "1.kv": 3}
    for kept, said in ((heads, True), (channels, False)):
        model = masked(families.with_lora(families.build("qwen2")), "uniform")
        masks = {k: (torch.arange(len(v)) < kept.get(k, 8)).float() for k, v in attachment_of(model).masks.items()}
        text = card_of(export(model, tmp_path / str(said), masks=masks)).text
        assert ("--model-impl transformers" in text) == said


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_what_is_not_written_to_gguf_is_not_promised(kind, tmp_path):
    pytest.importorskip("gguf")
    scaling = {"rope_type": kind, "factor": 2.0, "attention_factor": 1.5, "rope_theta": 10000.0}
    model = families.from_config(transformers.LlamaConfig(**families.SIZES, rope_parameters=scaling))
    text = (export(masked(families.with_lora(model), "width"), tmp_path / "out") / "README.md").read_text()
    assert "is not written to GGUF" in text
    assert "--format gguf" not in text


def test_what_the_tokenizer_keeps_from_gguf_is_not_promised(tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = masked(families.with_lora(families.build("llama")), "width"), tiny.tokenizer()
    text = (export(model, tmp_path / "out", processing_class=tokenizer) / "README.md").read_text()
    assert "not possible: THIS_FOLDER: the tokenizer has an id" in text
    assert "--format gguf" not in text


@pytest.mark.parametrize("name", ["models/My Model", "a--b/c", "models/llama-"])
def test_a_folder_that_is_not_there_any_more_need_not_be_a_name_of_the_hubs(name):
    assert provenance.origin_of(name).name == name.rsplit("/", 1)[-1]


def test_a_rotated_model_hands_name_and_licence_on(tmp_path):
    for name in ("base", "rotated"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gemma\nbase_model: google/gemma-3-270m\n---\n\n# Gemma\n"
    )
    write_rotated_card(tmp_path / "rotated", str(tmp_path / "base"), None, 1.3e-6)
    found, origin = origin_of(str(tmp_path / "rotated")), origin_of(str(tmp_path / "base"))
    assert (found.hub_name, found.licence) == (origin.hub_name, origin.licence) != (None, {})
    text = (tmp_path / "rotated" / "README.md").read_text()
    assert "moved logits by 1.3e-06 of their size" in text
    assert "gemma, as its card says of the model it was made from" in text
