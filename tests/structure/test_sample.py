"""By a few numbers one base model is told from another, whatever the dtype."""

import pytest
import torch

from atp.structure.discovery import discover
from atp.structure.sample import base_sample, is_another
from tests import families


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_another_model_of_the_same_shape_is_told_and_another_dtype_is_none(family):
    model = families.build(family)
    structure = discover(model)
    sample = base_sample(model, structure)
    assert sample == base_sample(families.with_lora(families.build(family)), structure)
    for dtype in (torch.bfloat16, torch.float16):
        assert not is_another(sample, base_sample(families.build(family).to(dtype), structure))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    assert is_another(sample, base_sample(model, structure))
    assert is_another(sample, sample[:-1])


def test_what_is_not_known_is_not_another():
    assert not is_another(None, [1.0])
    assert not is_another([1.0], None)
