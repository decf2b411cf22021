"""FLOPs per token. Oracles: torch's own counter, less attention; and the sizes multiplied by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from atp.evaluation import flops_per_token
from tests import tiny

TOKENS = 8


def counted_by_torch(model):
    """FLOPs of one forward over `TOKENS` tokens, without attention scores (batched or fused products)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    by_operation = counter.get_flop_counts()["Global"]
    return sum(v for operation, v in by_operation.items() if str(operation) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_as_torch_counts_linear_layers(changes):
    model = tiny.model(**changes)
    assert flops_per_token(model) * TOKENS == counted_by_torch(model)


def test_adapters_count():
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear"))
    assert flops_per_token(model) * TOKENS == counted_by_torch(model)


def test_by_hand_and_the_model_is_left_as_it_was():
    model = tiny.model().train()
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert flops_per_token(model) == 2 * (4 * block + 384 * 32)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
