"""A linear layer between gather and scatter. Oracle: dense products with zeros where features are gone, in float64."""

import os
import re

import pytest
import torch

from atp.ops.decode import gather_linear_scatter
from atp.ops.selection import Selection

not_in_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, which the interpreter does not"
)

KEPT = {"some": [True, False, True, True, False], "none": [False] * 5, "not asked": None}


def selection(kept):
    return None if KEPT[kept] is None else Selection.of(torch.tensor(KEPT[kept]))


def arguments(read="some", written="some", bias=True, tokens=(2, 3)):
    torch.manual_seed(0)
    selections = [selection(read), selection(written)]
    inputs, outputs = (5 if s is None else len(s.index) for s in selections)
    x, weight, b = (torch.randn(size, dtype=torch.float64) for size in ((*tokens, 5), (outputs, inputs), (outputs,)))
    return {"x": x, "weight": weight, "bias": b if bias else None, "read": selections[0], "written": selections[1]}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("written", KEPT)
@pytest.mark.parametrize("read", KEPT)
def test_the_definition_is_a_dense_product_with_zeros(read, written, bias):
    given = arguments(read, written, bias)
    reads, writes = (
        torch.eye(5).double() if s is None else torch.eye(5).double()[s.index] for s in list(given.values())[3:]
    )
    expected = given["x"] @ (writes.T @ given["weight"] @ reads).T + (given["bias"] @ writes if bias else 0)
    assert torch.allclose(gather_linear_scatter(**given), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_a_gradient_is_refused_and_not_lost(name):
    given = arguments()
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        gather_linear_scatter(**given)
    with torch.no_grad():
        gather_linear_scatter(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"\(..., 5\), \(3, 3\) and \(3,\), not \[\(2, 4\), \(3, 3\), \(3,\)\]"),
        ({"weight": torch.zeros(5, 3)}, r"not \[\(2, 3, 5\), \(5, 3\), \(3,\)\]"),
        ({"bias": torch.zeros(5)}, r"not \[\(2, 3, 5\), \(3, 3\), \(5,\)\]"),
        ({"read": None}, r"\(..., 5\), \(3, 5\) and \(3,\), not"),
        ({"impl": "cuda"}, r"impl 'cuda': one of"),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gather_linear_scatter(**arguments() | change)


@not_in_the_interpreter
def test_kernels_asked_for_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        gather_linear_scatter(**arguments(), impl="triton")


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("outputs", "programs"), [(576, 36), (2752, 172), (4096, 128), (5504, 172), (11008, 172), (14336, 224)]
)
def test_programs_keep_an_h100_busy(outputs, programs):
    pytest.importorskip("triton")
    from atp.ops.kernels.decode import blocks  # noqa: PLC0415 - triton is optional

    assert -(-outputs // blocks(outputs, 1, 2)[0]) == programs


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("outputs", "tokens", "read", "position", "products"),
    [
        (576, 64, "*i64", "*i32", "HMMA"),
        (2752, 1, "*i64", "*i32", "HMMA"),
        (4096, 1, "*i64", "*i32", "HMMA"),
        (4096, 32, "*i64", None, "HMMA"),
        (4096, 64, "*i64", "*i32", "HMMA"),
        (14336, 64, "*i64", "*i32", "HGMMA"),
        (14336, 1, None, None, "HGMMA"),
    ],
)
def test_an_h100_reads_the_weight_16_bytes_at_a_time_and_spills_nothing(
    tmp_path, outputs, read, position, products, tokens
):
    """Without waiting for it, into tensor cores; whole warpgroups take tiles of 64 outputs."""
    pytest.importorskip("triton")
    from atp.ops.kernels.decode import blocks, decode_kernel  # noqa: PLC0415 - triton is optional
    from tests.ops.sass import sass  # noqa: PLC0415 - as above

    names = ("block_outputs", "block_tokens", "block_inputs")
    *sizes, options = blocks(outputs, tokens, 2)
    tensors = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "read": read, "position": position, "y": "*bf16"}
    strides = {"x_stride": "i32:16", "x_feature_stride": 1, "weight_stride": "i32:16", "weight_input_stride": 1}
    counts = {"tokens": "i32", "outputs": "i32:16", "inputs": "i32:16"}
    given = tensors | strides | counts | dict(zip(names, sizes, strict=True))
    code = sass(decode_kernel, given, tmp_path, **options)
    assert set(re.findall(r"\bLDGSTS\b[.\w]*", code)) == {"LDGSTS.E.BYPASS.128"}
    assert set(re.findall(r"\bHG?MMA\b", code)) == {products}
    assert not re.search(r"\b(LD|ST)L\b", code)
