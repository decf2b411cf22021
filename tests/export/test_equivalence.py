"""Exported models against the masked model they come from.

Oracle: the live masked float32 model (LoRA unmerged, nothing sliced), and `Space.kept_parameters` for counts.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from atp.commands.inspect import equal_scores
from atp.errors import UnsupportedModelError
from atp.export import export, load
from atp.export.layout import is_plain
from atp.layers import attach, attachment_of
from atp.structure.budget import project
from atp.structure.building import WHOLE_ATTENTION, build_space
from atp.structure.discovery import discover
from atp.structure.live import causal_lm
from tests import families
from tests.export.cases import CASES, LAYER_NORMS, SPACES, exported, masked

every_case = pytest.mark.parametrize(("family", "space"), CASES)
some_cases = pytest.mark.parametrize(
    ("family", "space"),
    [
        ("phi3", "width"),
        ("gemma3", "disp"),
        ("gpt_neox", "disp"),
        ("llama", "values"),
        ("gemma3", "values"),
        ("gemma3", "all"),
        ("olmo2", "all"),
        ("gemma2", "depth"),
    ],
)


@every_case
def test_logits_equal_those_of_the_masked_model(family, space):
    case = exported(family, space)
    assert families.relative_error(families.logits(case.loaded), case.logits) <= 1e-5


@every_case
def test_parameter_count_is_the_predicted_one(family, space):
    case = exported(family, space)
    predicted = case.space.kept_parameters(case.space.kept_counts(case.masks)).item()
    blocks = case.loaded.get_submodule(case.space.structure.blocks[0].path.rpartition(".")[0])
    assert sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear)) == predicted
    parameters = case.loaded.config.atp["parameters"]
    assert parameters["after"] == case.loaded.num_parameters() < parameters["before"]
    assert parameters["before"] == families.build(family).num_parameters()


@every_case
def test_uniform_widths_give_the_stock_class_and_others_the_pruned_one(family, space):
    case = exported(family, space)
    stock = type(families.build(family))
    plain = is_plain(case.space, case.masks)
    assert plain or space not in ("uniform", "hidden", "blocks", "plainest")
    assert (type(case.loaded) is stock) == plain
    assert isinstance(case.loaded, stock)
    assert (case.folder / "modeling_atp.py").exists() != plain
    assert ("auto_map" in case.loaded.config.to_dict()) != plain


@every_case
def test_generation_with_a_cache_equals_generation_without(family, space):
    model = exported(family, space).loaded
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = families.tokens(2, 9)
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **settings))


def test_attention_that_is_gone_keeps_its_place_in_a_cache(tmp_path):
    """The first of its kind: there transformers looks up how many tokens a cache holds."""
    config = families.FAMILIES["gemma3"]()
    config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    model = families.with_lora(families.from_config(config))
    space = build_space(discover(model), "depth")
    gone = f"1.{WHOLE_ATTENTION}"
    attach(model, space).set_masks({s.name: torch.full((s.size,), s.name != gone) for s in space.sets})
    attachment_of(model).compact()
    prompt, seen = families.tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    seen[0, :3] = 0  # padding: without any there is no mask to be of the wrong size
    settings = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    found = []
    for each in (causal_lm(model).eval(), load(export(model, tmp_path / "pruned")).eval()):
        found += [torch.stack(each.generate(prompt, use_cache=used, **settings).logits) for used in (True, False)]
    assert all(families.relative_error(logits, found[1]) <= 1e-5 for logits in found)


@some_cases
def test_saving_the_loaded_model_again_loses_nothing(family, space, tmp_path):
    case = exported(family, space)
    case.loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(case.loaded)
    assert torch.equal(families.logits(again), families.logits(case.loaded))
    assert (tmp_path / "modeling_atp.py").read_bytes() == (case.folder / "modeling_atp.py").read_bytes()


@some_cases
def test_a_deep_copy_computes_the_same_and_shares_nothing(family, space):
    model = exported(family, space).loaded
    twin = copy.deepcopy(model)
    expected = families.logits(model)
    assert torch.equal(families.logits(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(families.logits(model), expected)


@some_cases
def test_a_pickled_copy_computes_the_same(family, space):
    """As processes that are spawned are given a model."""
    model = exported(family, space).loaded
    assert torch.equal(families.logits(pickle.loads(pickle.dumps(model))), families.logits(model))


@some_cases
def test_the_exported_model_can_be_tuned_and_merged_again(family, space):
    """Oracle: the tuned model before merging."""
    model = families.with_lora(copy.deepcopy(exported(family, space).loaded))
    model.train()
    batch = families.tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert gradients
    assert all(g is not None and g.isfinite().all() for g in gradients)
    tuned = families.logits(model.eval())
    merged = model.merge_and_unload()
    assert families.relative_error(families.logits(merged), tuned) <= 1e-5


@some_cases
def test_named_targets_work_as_on_the_stock_model(family, space):
    targets = [{"phi3": "qkv_proj", "gpt_neox": "query_key_value"}.get(family, "q_proj")]
    tuned = get_peft_model(copy.deepcopy(exported(family, space).loaded), LoraConfig(r=2, target_modules=targets))
    assert torch.equal(families.logits(tuned.eval()), families.logits(exported(family, space).loaded))


@pytest.mark.parametrize("space", SPACES)
def test_loading_in_bfloat16_keeps_indices_whole(space):
    case = exported("llama", space)
    half = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert families.relative_error(families.logits(half).float(), case.logits) <= 3e-2
    for name, buffer in case.loaded.named_buffers():
        if "residual" in name or "value" in name:
            assert torch.equal(buffer, half.get_buffer(name))


@pytest.mark.parametrize("space", SPACES)
def test_written_in_bfloat16_it_is_what_loading_in_bfloat16_gives(space, tmp_path):
    case = exported("llama", space)
    model = masked(families.with_lora(families.build("llama")), space)
    written = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "half", dtype=torch.bfloat16)).eval()
    assert written.dtype == torch.bfloat16
    read = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16).eval()
    assert torch.equal(families.logits(written), families.logits(read))


@pytest.mark.parametrize("family", LAYER_NORMS)
def test_a_stream_under_layer_norms_is_not_cut(family):
    with pytest.raises(UnsupportedModelError, match="not an RMS norm whose place is known|cannot say another"):
        masked(families.build(family), "hidden")


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_padding_on_the_left_changes_nothing_where_attentions_are_gone(family):
    """Oracle: the prompt by itself."""
    model = exported(family, "depth").loaded
    prompt, settings = families.tokens(1, 9), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    padded, seen = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1), torch.ones(1, 13, dtype=torch.long)
    seen[:, :4] = 0
    for cache in ("dynamic", "static"):
        beside = model.generate(padded, attention_mask=seen, cache_implementation=cache, **settings)
        assert torch.equal(beside[:, 13:], alone[:, 9:]), cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_blocks_that_happen_to_be_alike_give_a_width_that_the_config_takes(family, tmp_path):
    """Without `uniform`: as many heads are left in every block, and the stream's width must be a multiple of those."""
    for sparsity in (0.2, 0.35, 0.5, 0.6):
        model = families.build(family)
        space = build_space(discover(model), "width+hidden")
        attach(model, space).set_masks(project(equal_scores(space), space, sparsity))
        loaded = load(export(model, tmp_path / str(sparsity))).eval()
        assert families.relative_error(families.logits(loaded), families.logits(model)) <= 1e-5


def test_tied_embeddings_stay_tied():
    for space in SPACES:
        model = exported("llama_tied", space).loaded
        assert model.lm_head.weight is model.model.embed_tokens.weight
