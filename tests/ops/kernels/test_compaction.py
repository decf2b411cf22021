"""The compaction kernel, there and back. Oracle: indexing and its gradient, in every bit."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from atp.ops.compaction import _compact, _compact_into, compact_weight
from atp.ops.selection import Selection
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter

DTYPES = [torch.float32, torch.float16]

SHAPES = [(1, 1), (3, 37), (300, 17), (10, 1100)]
"""Rows, columns: of one tile and of several, whole and not."""

KEPT = {
    "some": lambda n: torch.arange(n) % 3 > 0,
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "one": lambda n: torch.arange(n) == n // 2,
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "not asked": None,
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def selections(*kept_and_sizes):
    return [None if KEPT[kept] is None else Selection.of(KEPT[kept](n)) for kept, n in kept_and_sizes]


def indexed(weight, rows, cols):
    weight = weight if rows is None else weight[rows.index]
    return weight if cols is None else weight[:, cols.index]


def results(function, weight, rows, cols, **options):
    """Value, and the gradient for one whose entries are all different."""
    leaf = weight.detach().requires_grad_()
    y = function(leaf, rows, cols, **options)
    return y.detach(), *torch.autograd.grad(y, leaf, torch.arange(y.numel()).view(y.shape).to(y.dtype) / 7 + 1)


def assert_equal(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        assert torch.equal(f, e)


@pytest.mark.parametrize("cols", ["some", "not asked"])
@pytest.mark.parametrize("rows", ["some", "not asked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient(shape, dtype, rows, cols):
    weight, kept = torch.randn(shape).to(dtype), selections((rows, shape[0]), (cols, shape[1]))
    assert_equal(results(compact_weight, weight, *kept, impl="triton"), results(indexed, weight, *kept))


@pytest.mark.parametrize("cols", KEPT)
@pytest.mark.parametrize("rows", KEPT)
def test_any_number_of_kept_rows_and_columns(rows, cols):
    weight, kept = torch.randn(3, 37), selections((rows, 3), (cols, 37))
    assert_equal(results(compact_weight, weight, *kept, impl="triton"), results(indexed, weight, *kept))


def test_the_gradient_off_the_support_is_zero():
    rows, cols = selections(("some", 3), ("one", 37))
    _, gradient = results(compact_weight, torch.randn(3, 37), rows, cols, impl="triton")
    assert gradient[1:, 18].all()
    assert gradient.count_nonzero() == 2


def test_the_gradients_own_gradient():
    weight, kept = torch.randn(3, 37, requires_grad=True), selections(("some", 3), ("some", 37))
    y = compact_weight(weight, *kept, impl="triton")
    of_y = torch.randn_like(y).requires_grad_()
    [of_weight] = torch.autograd.grad(y, weight, of_y, create_graph=True)
    v = torch.randn_like(weight)
    [found] = torch.autograd.grad(of_weight, of_y, v)
    assert torch.equal(found, indexed(v, *kept))


@pytest.mark.parametrize("make", [lambda w: w.T.contiguous().T, lambda w: w.repeat(1, 2)[:, :37]])
def test_weights_and_buffers_of_any_stride(make):
    weight, kept = torch.randn(3, 37), selections(("some", 3), ("some", 37))
    expected = indexed(weight, *kept)
    strided = make(weight)
    assert strided.stride() != weight.stride()
    out = torch.full((2 * expected.shape[1], 5), torch.nan).T[1:3, ::2]
    compact_weight(strided, *kept, out, impl="triton")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", KEPT)
def test_into_out(rows):
    weight, kept = torch.randn(17, 37), selections((rows, 17), ("some", 37))
    expected = indexed(weight, *kept)
    out = torch.full_like(expected, torch.nan)
    found = compact_weight(weight.requires_grad_(), *kept, out, impl="triton")
    assert found is out
    assert not found.requires_grad
    assert torch.equal(out, expected)


def test_two_runs_agree_in_every_bit():
    weight, kept = torch.randn(300, 17), selections(("some", 300), ("some", 17))
    assert_equal(*(results(compact_weight, weight, *kept, impl="triton") for _ in range(2)))


@pytest.mark.parametrize("cols", ["some", "not asked"])
def test_operations_are_registered_as_torch_wants_them(cols):
    weight, (rows, cols) = torch.randn(3, 5, requires_grad=True), selections(("some", 3), (cols, 5))
    maps = [rows.index, rows.position] + ([None, None] if cols is None else [cols.index, cols.position])
    torch.library.opcheck(_compact, (weight, *maps))
    out = torch.empty_like(indexed(weight.detach(), rows, cols))
    torch.library.opcheck(_compact_into, (weight.detach(), maps[0], maps[2], out))


@pytest.mark.parametrize("into", ["a new tensor", "out"])
def test_compiles_into_one_graph(into):
    weight, kept = torch.randn(17, 37), selections(("some", 17), ("some", 37))
    compiled = torch.compile(compact_weight, fullgraph=True, backend="aot_eager")
    if into == "out":
        out = torch.full_like(indexed(weight, *kept), torch.nan)
        assert torch.equal(compiled(weight, *kept, out, impl="triton"), indexed(weight, *kept))
        assert torch.equal(out, indexed(weight, *kept))
    else:
        assert_equal(results(compiled, weight, *kept, impl="triton"), results(indexed, weight, *kept))


def test_other_widths_need_no_graphs_of_their_own():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compact_weight, fullgraph=True, dynamic=True, backend=counter)
    for width in range(5, 12):
        weight, kept = torch.randn(9, 40), (None, Selection.of(torch.arange(40) < width))
        assert torch.equal(compiled(weight, *kept, impl="triton"), indexed(weight, *kept))
    assert counter.frame_count <= 2
