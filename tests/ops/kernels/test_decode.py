"""The decoding kernel. Oracle: its eager definition in float64, of the same numbers."""

import pytest
import torch

from atp.ops import decode
from atp.ops.decode import _gather_linear_scatter, gather_linear_scatter, gather_linear_scatter_eager
from atp.ops.selection import Selection
from tests import families
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter

TOLERANCES = {torch.float32: 1e-6, torch.float16: 4e-4}

KEPT = {
    "some": lambda n: torch.arange(n) % 3 > 0,
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "one": lambda n: torch.arange(n) == n // 2,
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "not asked": None,
}

SIZES = [(37, 300), (300, 37)]
"""Features of the input and of the result: in one block and in several."""


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(leading, size=SIZES[0], dtype=torch.float32, read="some", written="some", bias=True):
    torch.manual_seed(0)
    selections = [
        None if KEPT[k] is None else Selection.of(KEPT[k](n)) for k, n in zip((read, written), size, strict=True)
    ]
    inputs, outputs = (n if s is None else len(s.index) for s, n in zip(selections, size, strict=True))
    x, weight, b = (torch.randn(shape, dtype=dtype) for shape in ((*leading, size[0]), (outputs, inputs), (outputs,)))
    return {"x": x, "weight": weight, "bias": b if bias else None, "read": selections[0], "written": selections[1]}


def exact(given):
    return gather_linear_scatter_eager(**{n: t.double() if torch.is_tensor(t) else t for n, t in given.items()})


def assert_right(given):
    found, expected = gather_linear_scatter(**given, impl="triton"), exact(given)
    assert found.dtype == given["x"].dtype
    assert found.shape == expected.shape
    zero = expected == 0
    assert torch.equal(found == 0, zero)
    assert zero.all() or families.relative_error(found.double(), expected) <= TOLERANCES[found.dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("leading", [(1,), (3,), (1, 17), (2, 32)])
def test_values(leading, size, dtype, bias):
    assert_right(arguments(leading, size, dtype, bias=bias))


@pytest.mark.parametrize("written", KEPT)
@pytest.mark.parametrize("read", KEPT)
def test_any_number_of_features_read_and_written(read, written):
    assert_right(arguments((3,), read=read, written=written))


@pytest.mark.parametrize(("read", "written"), [("none", "some"), ("some", "none")])
def test_without_bias_nothing_comes_of_nothing(read, written):
    assert not gather_linear_scatter(**arguments((3,), read=read, written=written, bias=False), impl="triton").any()


def test_no_tokens():
    assert gather_linear_scatter(**arguments((0, 3)), impl="triton").shape == (0, 3, 300)


def test_features_that_are_not_read_may_be_anything():
    given = arguments((3,))
    clean = gather_linear_scatter(**given, impl="triton")
    given["x"][:, given["read"].position < 0] = torch.nan
    assert torch.equal(gather_linear_scatter(**given, impl="triton"), clean)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_features_that_are_gone_are_zero_even_for_what_is_not_finite():
    given = arguments((3,))
    given["x"].fill_(torch.inf)
    y = gather_linear_scatter(**given, impl="triton")
    assert not y[:, given["written"].position < 0].any()
    assert not y[:, given["written"].index].isfinite().any()


def test_inputs_of_any_stride():
    given = arguments((3,))
    expected = gather_linear_scatter(**given, impl="triton")
    given["x"] = given["x"].T.contiguous().T
    given["weight"] = given["weight"].T.contiguous().T
    assert torch.equal(gather_linear_scatter(**given, impl="triton"), expected)
    given["x"] = given["x"].repeat(1, 2).view(3, 2, -1)[:, -1]
    given["weight"] = given["weight"].repeat(1, 2)[:, : given["weight"].shape[1]]
    assert torch.equal(gather_linear_scatter(**given, impl="triton"), expected)


def test_a_bias_of_any_stride():
    given = arguments((2,))
    assert_right(given | {"bias": torch.stack([given["bias"], given["bias"] * 7], 1)[:, 0]})


@pytest.mark.parametrize(("tokens", "kernels"), [(64, 1), (65, 0)])
def test_more_tokens_are_left_to_the_definition(monkeypatch, tokens, kernels):
    calls = []
    monkeypatch.setattr(decode, "_gather_linear_scatter", lambda *given: calls.append(given) or given[0])
    gather_linear_scatter(**arguments((tokens,)), impl="triton")
    assert len(calls) == kernels


def test_two_runs_agree_in_every_bit():
    runs = [gather_linear_scatter(**arguments((17,), dtype=torch.float16), impl="triton") for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("kept", ["some", "not asked"])
def test_the_operation_is_registered_as_torch_wants_it(kept):
    x, weight, bias, read, written = arguments((3,), (5, 7), read=kept, written=kept, bias=kept == "some").values()
    maps = (None, None) if read is None else (read.index, written.position)
    torch.library.opcheck(_gather_linear_scatter, (x, weight, bias, *maps))


def test_compiles_into_one_graph():
    given = arguments((1, 17))
    compiled = torch.compile(gather_linear_scatter, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given, impl="triton"), gather_linear_scatter(**given, impl="triton"))
