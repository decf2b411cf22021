"""Discovery and the tables of groups.

Oracle: the live modules themselves (their weights counted), and models that must be refused.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from atp.errors import ConfigError, UnsupportedModelError
from atp.structure.building import build_space, default_round_to
from atp.structure.discovery import discover
from tests import families, tiny
from tests.export.cases import CASES, PACKED, exported

every_family = pytest.mark.parametrize("family", families.FAMILIES)
every_case = pytest.mark.parametrize(
    ("family", "space_name"), [case for case in CASES if case[1] in ("width", "disp", "values")]
)


def _live_weights(model) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@every_family
def test_every_decoder_linear_is_found_and_counted(family):
    model = families.build(family)
    structure = discover(model)
    live = _live_weights(model)
    assert {linear.path for block in structure.blocks for linear in block.linears} == set(live)
    assert structure.prunable_parameters == sum(linear.weight.numel() for linear in live.values())


@every_family
def test_lora_changes_nothing_that_is_found(family):
    bare = discover(families.build(family))
    assert discover(families.with_lora(families.build(family))) == bare


@every_case
def test_the_full_decision_keeps_everything(family, space_name):
    space = build_space(discover(families.build(family)), space_name)
    assert space.kept_parameters(space.kept_counts(space.full())).item() == space.prunable_parameters
    assert space.sparsity(space.full()) == 0.0
    assert set(space.kept_share(space.full()).values()) == {1.0}


@every_case
def test_removing_one_group_removes_its_rows_and_columns(family, space_name):
    """Counted by marking features, one by one, not by the table of units."""
    space = build_space(discover(families.build(family)), space_name)
    for group_set in (s for s in space.sets if s.block == 0):
        masks = space.full()
        masks[group_set.name][-1] = 0.0
        kept = 0
        for linear in space.linears:
            alive = torch.ones(linear.out_features, linear.in_features)
            if linear.rows is not None:
                alive *= masks[linear.rows.set][linear.rows.owner][:, None]
            if linear.cols is not None:
                alive *= masks[linear.cols.set][linear.cols.owner][None, :]
            kept += int(alive.sum())
        assert space.kept_parameters(space.kept_counts(masks)).item() == kept < space.prunable_parameters


@pytest.mark.parametrize("family", PACKED)
def test_values_that_are_packed_with_queries_lose_nothing_by_themselves(family):
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\..*packs values with others: space 'values' needs a"):
        build_space(discover(families.build(family)), "values")


def test_values_that_go_through_a_norm_lose_nothing():
    model = families.build("llama")
    model.model.layers[0].self_attn.v_norm = LlamaRMSNorm(8)
    build_space(discover(model), "width")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn\.v_proj is followed by a norm"):
        build_space(discover(model), "values")


def test_rounding_defaults_depend_on_width_alone():
    assert [default_round_to(n) for n in (127, 128, 511, 512, 2047, 2048, 8191, 8192)] == [1, 8, 8, 16, 16, 64, 64, 128]


@pytest.mark.parametrize(
    ("hidden", "heads", "round_to", "step"), [(576, 9, None, 9), (576, 9, 16, 144), (2304, 9, None, 576)]
)
def test_a_narrow_stream_is_cut_by_its_heads_alone(hidden, heads, round_to, step):
    with torch.device("meta"):
        model = tiny.model(
            hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=3, head_dim=hidden // heads
        )
    [found] = [s for s in build_space(discover(model), "hidden", round_to=round_to).sets if s.kind == "hidden"]
    assert found.counts == tuple(range(step, hidden + 1, step))


def test_rounding_coarser_than_the_widths_is_refused():
    with pytest.raises(ConfigError, match="round_to=64"):
        build_space(discover(families.build("llama")), "width", round_to=64)


@pytest.mark.parametrize("name", ["heads", "width+disp", "width+width", ""])
def test_unknown_spaces_are_refused(name):
    with pytest.raises(ConfigError, match="several of width, hidden, depth joined by"):
        build_space(discover(families.build("llama")), name)


def _tiny(name: str, **changes: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**changes)
    return AutoModelForCausalLM.from_config(config)


def test_mixture_of_experts_is_refused_by_name():
    model = _tiny("Mixtral", **families.SIZES, num_local_experts=2)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp"):
        discover(model)


def test_transposed_weights_are_refused_by_name():
    model = _tiny("GPT2", vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D"):
        discover(model)


def test_families_without_a_plan_are_refused():
    model = _tiny(
        "OPT",
        vocab_size=97,
        hidden_size=48,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
    )
    with pytest.raises(UnsupportedModelError, match="opt.*base_model_tp_plan"):
        discover(model)
    model.config.base_model_tp_plan = {"decoder.project_in": "colwise"}  # none of the blocks', as LFM2's
    with pytest.raises(UnsupportedModelError, match="opt.*base_model_tp_plan of its blocks"):
        discover(model)


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("model.layers.1.mlp.router", nn.Linear(48, 4)),
        ("model.layers.0.extra", nn.Linear(48, 48)),
        ("model.layers.1.self_attn.surprise_norm", nn.LayerNorm(17)),
    ],
)
def test_unknown_modules_in_a_block_are_refused_by_name(where, module):
    model = families.build("llama")
    parent, name = where.rsplit(".", 1)
    model.get_submodule(parent).add_module(name, module)
    with pytest.raises(UnsupportedModelError, match=where.replace(".", r"\.")):
        discover(model)


def test_a_classifier_is_refused():
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification is no causal LM: load it with"):
        discover(LlamaForSequenceClassification(families.build("llama").config))


def test_a_bare_decoder_is_refused():
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        discover(families.build("llama").model)


def test_other_modules_are_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        discover(nn.Linear(2, 2))


@pytest.mark.parametrize("space", ["width", "uniform"])
@every_family
def test_an_exported_model_is_found_with_the_sizes_it_has(family, space):
    case = exported(family, space)
    structure, original = discover(case.loaded), case.space.structure
    assert structure.prunable_parameters == case.space.kept_parameters(case.space.kept_counts(case.masks)).item()
    assert structure.model_type == original.model_type
    assert [b.mlp.intermediate_size for b in structure.blocks] == [
        case.masks[f"{b.index}.mlp"].sum() for b in original.blocks
    ]
    assert [b.attention.num_kv_heads for b in structure.blocks] == [
        case.masks[f"{b.index}.kv"].sum() for b in original.blocks
    ]


def test_a_model_whose_blocks_see_a_part_of_the_residual_stream_is_refused():
    with pytest.raises(UnsupportedModelError, match="space 'disp', which cannot be pruned again: start from its base"):
        discover(exported("llama", "disp").loaded)
