"""The layer that kernels are timed in. Oracle: the dense layer under masks, and the export's share of weights."""

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from atp.bench import kernel_cases, kernels, pruned_copy
from atp.bench.copies import mask_at_random, on_the_same_tensors
from atp.config import ATPConfig
from atp.errors import ConfigError, UnsupportedModelError
from atp.evaluation import count_parameters
from atp.layers import attachment_of
from tests import families, tiny

TOKENS = 5


@pytest.fixture
def base():
    return tiny.model()


@pytest.mark.parametrize("space", ["width", "disp"])
def test_the_compact_layer_computes_what_the_masked_one_does(base, space):
    model = on_the_same_tensors(base)
    mask_at_random(model, ATPConfig(space=space, sparsity=0.5, round_to=1))
    full = kernels._first_layer(model)
    norm = torch.randn(base.config.hidden_size)
    stream = torch.randn(TOKENS, len(norm))
    masks = {name.split(".")[1]: m for name, m in attachment_of(model).masks.items() if name.startswith("0.")}
    expected = masked_layer(model.model.layers[0], stream, norm, masks)
    start = rms_norm(stream, norm.shape, norm, 1e-5)
    read = full.attention[0].read
    start = start if read is None else start[:, read.index]
    compact = full.each(lambda one: one.compact)
    assert torch.allclose(
        compact.run(stream, start, norm, kernels._with_index_operations, kernels._plain_gate), expected, atol=1e-5
    )


def masked_layer(block, stream, norm, masks):
    def mask(kind, x):
        return x * masks[kind].repeat_interleave(x.shape[-1] // len(masks[kind])) if kind in masks else x

    n = mask("attention_in", rms_norm(stream, norm.shape, norm, 1e-5))
    heads = mask("kv", linear(n, block.self_attn.q_proj.weight))
    stream = stream + mask("attention_out", linear(heads, block.self_attn.o_proj.weight))
    n = mask("mlp_in", rms_norm(stream, norm.shape, norm, 1e-5))
    hidden = silu(linear(n, block.mlp.gate_proj.weight)) * linear(n, block.mlp.up_proj.weight)
    return stream + mask("mlp_out", linear(mask("mlp", hidden), block.mlp.down_proj.weight))


def test_an_mlp_without_a_gate_is_refused():
    with pytest.raises(UnsupportedModelError, match="Starcoder2ForCausalLM has MLPs without a gate"):
        kernel_cases(families.build("starcoder2"), ATPConfig(sparsity=0.5, round_to=1), TOKENS)


def test_a_space_that_leaves_layers_whole_is_refused(base):
    with pytest.raises(ConfigError, match="'depth' removes whole layers"):
        kernel_cases(base, ATPConfig(space="depth", sparsity=0.5), TOKENS)


@pytest.mark.parametrize("space", ["width", "disp"])
def test_limits_are_the_share_of_weights_that_stay(base, space):
    config = ATPConfig(space=space, sparsity=0.5, round_to=1)
    cases = kernel_cases(base, config, TOKENS)
    head = base.lm_head.weight.numel()
    linears = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear)) - head
    left = 1 - (count_parameters(base) - count_parameters(pruned_copy(base, config))) / linears
    for bench in ("layer", "decode, one token"):
        dense, *others = cases[bench]
        assert dense.limit is None
        limits = [case.limit for case in others if not case.name.startswith("copy")]
        assert limits == pytest.approx([left] * len(limits), abs=0.03)
        assert limits
    for of_bench in cases.values():
        for case in of_bench:
            case.call()
            case.call()


def test_decoding_is_compared_with_copies_that_no_cache_holds(base):
    [copy] = [
        case
        for case in kernel_cases(base, ATPConfig(space="width", sparsity=0.5, round_to=1), TOKENS)["decode, one token"]
        if case.name.startswith("copy")
    ]
    targets = [copy.call() for _ in range(kernels._MOST_COPIES + 1)]
    assert len({id(target) for target in targets}) == kernels._MOST_COPIES
    assert targets[0] is targets[-1]
