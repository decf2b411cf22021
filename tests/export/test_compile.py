"""Exported models under `torch.compile` and with a static cache. Oracle: the same model without."""

import pytest
import torch

from atp.export import load
from tests import families
from tests.export.cases import exported

every_case = pytest.mark.parametrize(
    ("family", "space"),
    [(f, s) for f in ("llama", "qwen3", "gemma3", "phi3") for s in ("width", "disp")]
    + [("llama", "values"), ("gemma3", "values")],
)


@every_case
def test_compiles_into_one_graph(family, space):
    model = load(exported(family, space).folder).eval()
    expected = families.logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(families.tokens(), use_cache=False).logits, expected, atol=1e-5)


@every_case
def test_a_static_cache_gives_the_same_tokens(family, space):
    model = load(exported(family, space).folder).eval()
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(families.tokens()[:, :4], **settings)
    found = model.generate(families.tokens()[:, :4], cache_implementation="static", **settings)
    assert torch.equal(found, expected)


@every_case
def test_a_prompt_is_read_in_chunks_into_a_static_cache(family, space):
    model = load(exported(family, space).folder).eval()
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(families.tokens()[:, :8], **settings)
    found = model.generate(families.tokens()[:, :8], cache_implementation="static", prefill_chunk_size=4, **settings)
    assert torch.equal(found, expected)
