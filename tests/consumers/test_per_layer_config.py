"""What stock transformers does with `per_layer_config`: why ragged folders do not say their sizes by it.

Oracle: transformers itself. When one of these fails, its Llama may have learned to build blocks of unequal size, and
the finding in `atp/export/layout.py` should be looked at again.
"""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import families
from tests.export.cases import exported

AMBIGUOUS = "is a per-layer attribute and may vary across layers"


def with_sizes(**sizes: object) -> LlamaConfig:
    return LlamaConfig(**families.SIZES, per_layer_config={0: sizes})


def test_widths_are_kept_in_the_config_and_stock_llama_does_not_build_them():
    config = with_sizes(intermediate_size=24)
    assert [block.intermediate_size for block in config.per_layer_config] == [24, 40]
    assert LlamaConfig.from_dict(config.to_dict()).to_dict()["per_layer_config"] == {"0": {"intermediate_size": 24}}
    with pytest.raises(RuntimeError, match=f"'intermediate_size' {AMBIGUOUS}"):
        LlamaForCausalLM(config)


def test_with_the_leave_to_read_one_width_for_all_stock_llama_builds_full_blocks():
    config = with_sizes(intermediate_size=24)
    config.allow_global_per_layer_attribute_access = True
    model = LlamaForCausalLM(config)
    assert {block.mlp.up_proj.out_features for block in model.model.layers} == {40}
    assert config.to_dict()["allow_global_per_layer_attribute_access"] is True  # and whoever loads it has it too


def test_head_counts_are_refused_by_the_config():
    with pytest.raises(RuntimeError, match=f"'num_attention_heads' {AMBIGUOUS}"):
        with_sizes(num_attention_heads=4, num_key_value_heads=2)


def test_skipped_parts_are_built_all_the_same_and_nobody_says_so():
    model = LlamaForCausalLM(with_sizes(skip=["mlp"]))
    assert model.model.layers[0].mlp.up_proj.out_features == families.SIZES["intermediate_size"]


@pytest.mark.parametrize("space", ["width", "disp"])
def test_exported_configs_say_nothing_of_the_kind(space):
    config = exported("llama", space).loaded.config
    assert not config.is_heterogeneous
    assert "per_layer_config" not in config.to_dict()
