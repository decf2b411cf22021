"""Families of transformers that no other test builds, tuned, masked and exported.

Oracle: the live masked float32 model (LoRA unmerged, nothing sliced).
"""

from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from atp.errors import UnsupportedModelError
from atp.export import export, load
from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from tests import families
from tests.export.cases import masked, random_masks

MORE = [
    *("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma4_text"),
    *("gemma4_unified_text", "glm", "glm4", "helium", "hyperclovax", "internlm3", "iquestcoder", "jais2"),
    *("ministral", "ministral3", "nanochat", "nemotron", "olmo", "olmo3", "phi", "seed_oss", "vaultgemma"),
]
BESIDES = {
    "gemma4_text": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 1},
    "helium": {"head_dim": 8},
    "ministral": {"head_dim": 8},
}


@pytest.mark.parametrize("space", ["width", "disp"])
@pytest.mark.parametrize("family", MORE)
def test_logits_equal_those_of_the_masked_model(tmp_path: Path, family: str, space: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    config = CONFIG_MAPPING[family](**families.SIZES, **BESIDES.get(family, {}))
    model = masked(families.with_lora(families.from_config(config)), space)
    expected = families.logits(model)
    found = families.logits(load(export(model, tmp_path / "pruned")).eval())
    assert families.relative_error(found, expected) <= 1e-5


def test_a_family_that_derives_its_head_size_is_not_exported_as_if_it_did_not(tmp_path: Path) -> None:
    """Helium writes from as many features as its stream has, whatever `head_dim` says."""
    if "helium" not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no helium")
    config = CONFIG_MAPPING["helium"](**families.SIZES, **BESIDES["helium"])
    model = families.with_lora(families.from_config(config))
    space = build_space(discover(model), "width", uniform=True)
    attach(model, space).set_masks(random_masks(space, 0.4))
    expected = families.logits(model.eval())
    found = families.logits(load(export(model, tmp_path / "pruned")).eval())
    assert families.relative_error(found, expected) <= 1e-5
    with pytest.raises(UnsupportedModelError, match="a helium config cannot say another hidden_size"):
        build_space(discover(model), "hidden")
