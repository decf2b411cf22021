"""The gated product. Oracles: the activations written out, and finite differences, both in float64."""

import os
import re

import pytest
import torch

from atp.ops.gated import ACTIVATIONS, gated, gated_eager

WIDTHS = {4096: 1024, 11008: 1024, 14336: 1024, 2752: 1024, 576: 256}
"""Features, and how many of them a program takes."""


def arguments(features=5, mask=True):
    torch.manual_seed(0)
    gate, up, soft = torch.randn(2, 3, features), torch.randn(2, 3, features), torch.rand(features)
    return [t.double().requires_grad_() for t in (gate, up, soft)][: 3 if mask else 2]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    ("activation", "act"),
    [
        ("silu", lambda x: x / (1 + (-x).exp())),
        ("gelu_tanh", lambda x: x / 2 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())),
    ],
)
def test_the_definition_is_the_equation(activation, act, mask):
    gate, up, *soft = arguments(mask=mask)
    expected = act(gate) * up * (soft[0] if mask else 1)
    assert torch.allclose(gated(gate, up, *soft, activation=activation), expected, rtol=1e-12)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definitions_gradients_are_those_of_finite_differences(activation, mask):
    assert torch.autograd.gradcheck(lambda *given: gated(*given, activation=activation), arguments(mask=mask))


def test_float32_inside_and_gates_dtype_outside():
    gate, up, mask = (t.detach().to(torch.bfloat16) for t in arguments())
    y = gated(gate, up, mask.float())
    assert torch.equal(y, gated_eager(gate.float(), up.float(), mask.float()).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation 'relu': one of silu, gelu_tanh"),
        ({"up": torch.zeros(2, 3, 4)}, r"not \[\(2, 3, 5\), \(2, 3, 4\), \(5,\)\]"),
        ({"mask": torch.zeros(3, 5)}, r"not \[\(2, 3, 5\), \(2, 3, 5\), \(3, 5\)\]"),
        ({"impl": "cuda"}, r"impl 'cuda': one of"),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    given = dict(zip(("gate", "up", "mask"), arguments(), strict=True))
    with pytest.raises(ValueError, match=message):
        gated(**given | change)


not_in_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, which the interpreter does not"
)


@not_in_the_interpreter
def test_kernels_asked_for_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        gated(*arguments(), impl="triton")


@pytest.fixture
def machine_code(tmp_path):
    """Of a kernel for bfloat16, from what is special about its arguments."""
    pytest.importorskip("triton")
    from triton.language import constexpr  # noqa: PLC0415 - triton is optional

    from atp.ops.kernels import gated as kernels  # noqa: PLC0415 - as above
    from tests.ops.sass import sass  # noqa: PLC0415 - as above

    def compiled(name, features, activation, **given):
        block, warps = kernels.strip(features)
        given |= {"activation": constexpr(activation), "block": block, "rows": "i32"}
        given |= dict.fromkeys(("gate_stride", "up_stride", "of_y_stride", "features"), "i32:16")
        given |= dict.fromkeys(("gate", "up", "y", "of_y", "of_gate", "of_up"), "*bf16")
        if name == "forward_kernel":
            given |= {"block_rows": kernels.ROWS_FORWARD}
        else:
            given |= {"block_rows": kernels.ROWS_BACKWARD, "tiles": kernels.TILES if given["partials"] else 1}
        kernel = getattr(kernels, name)
        return sass(kernel, {name: given[name] for name in kernel.arg_names}, tmp_path, warps)

    return compiled


@not_in_the_interpreter
@pytest.mark.parametrize(("features", "block"), WIDTHS.items())
def test_a_program_takes_a_strip_that_fits_the_width(features, block):
    pytest.importorskip("triton")
    from atp.ops.kernels.gated import strip  # noqa: PLC0415 - triton is optional

    assert strip(features)[0] == block


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("features", "name", "activation", "special"),
    [
        (11008, "forward_kernel", "silu", {"mask": "*fp32"}),
        (576, "forward_kernel", "gelu_tanh", {"mask": None}),
        (2752, "backward_kernel", "silu", {"mask": "*fp32", "partials": "*fp32"}),
        (4096, "backward_kernel", "gelu_tanh", {"mask": "*fp32", "partials": "*fp32"}),
        (576, "backward_kernel", "gelu_tanh", {"mask": "*fp32", "partials": "*fp32"}),
        (4096, "backward_kernel", "silu", {"mask": None, "partials": None}),
    ],
)
def test_an_h100_moves_16_bytes_at_a_time_and_spills_nothing(machine_code, features, name, activation, special):
    code = machine_code(name, features, activation, **special)
    assert set(re.findall(r"\b(?:LD|ST)[GL]\b[.\w]*", code)) == {"LDG.E.128", "STG.E.128"}
