"""Parts of a model. Oracle: sizes multiplied by hand, and the whole model's parameters."""

import pytest
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from atp.evaluation import count_parameters, parts
from tests import tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384, "pad_token_id": 0}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}


def test_by_hand_and_the_model_is_left_as_it_was():
    model = tiny.model().train()
    found = parts(model, prompt_tokens=8, calls=1)
    assert {name: part["parameters"] for name, part in found.items()} == {
        "embedding": 384 * 32,
        "attention": 4 * (2 * 32 * 32 + 2 * 16 * 32),
        "mlp": 4 * 3 * 48 * 32,
        "norms": 9 * 32,
        "head": 384 * 32,
    }
    assert all(part["ms"] > 0 for part in found.values())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_tied_head_has_time_but_no_parameters():
    found = parts(tiny.model(tie_word_embeddings=True), prompt_tokens=8, calls=1)
    assert found["head"]["parameters"] == 0
    assert found["head"]["ms"] > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=384, **ENDS)),
        lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=48)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, intermediate_size=48, head_dim=8, num_key_value_heads=2)),
    ],
)
def test_all_parameters_are_somewhere_in_other_families(make):
    model = make()
    found = parts(model, prompt_tokens=8, calls=1)
    assert sum(part["parameters"] for part in found.values()) == count_parameters(model)
    assert all(found[name]["parameters"] > 0 for name in ("embedding", "attention", "mlp", "norms"))


def test_what_is_not_known_has_no_parts():
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=384, state_size=4, **ENDS))
    assert parts(mamba, prompt_tokens=8, calls=1) is None
    beside = tiny.model()
    beside.model.extra = nn.Linear(4, 4)
    assert parts(beside, prompt_tokens=8, calls=1) is None
