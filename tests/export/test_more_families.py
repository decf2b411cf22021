"""Families of transformers that no other test builds, tuned, masked and exported.

Oracle: the live masked float32 model (LoRA unmerged, nothing sliced).
"""

from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from atp.export import export, load
from tests import families
from tests.export.cases import masked

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
