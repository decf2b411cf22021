"""The gated product's kernels. Oracle: its eager definition in float64, of the same numbers."""

import pytest
import torch

from atp.ops.gated import ACTIVATIONS, _gated, _gated_backward, gated, gated_eager
from tests import families
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter

TOLERANCES = {torch.float32: 1e-6, torch.float16: 4e-4}

SHAPES = [(1, 1), (3, 37), (17, 576), (2, 17, 300), (70, 5)]
"""Leading dimensions, features: one row, several tiles of rows, several partial sums; several strips, whole and not."""

MASKS = {
    "soft": lambda features: torch.rand(features),
    "hard": lambda features: torch.arange(features) % 3 > 0,
    "all kept": lambda features: torch.ones(features),
    "one kept": lambda features: torch.arange(features) == features // 2,
    "none kept": lambda features: torch.zeros(features),
    "none at all": lambda features: None,
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def arguments(shape, dtype=torch.float32, mask="soft", mask_dtype=torch.float32):
    """Halves of one packed tensor, the mask, and what the result's gradient shall be."""
    torch.manual_seed(0)
    *leading, features = shape
    packed, of_y = torch.randn(*leading, 2 * features, dtype=dtype), torch.randn(shape, dtype=dtype)
    gate, up = packed.tensor_split(2, -1)
    made = MASKS[mask](features)
    leaves = [gate, up] if made is None else [gate, up, made.to(mask_dtype)]
    return [leaf.detach().requires_grad_() for leaf in leaves], of_y


def results(function, leaves, of_y, **options):
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, of_y)]


def exact(leaves, of_y, **options):
    return results(gated_eager, [leaf.detach().double().requires_grad_() for leaf in leaves], of_y.double(), **options)


def assert_close(found, expected):
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert families.relative_error(f.double(), e) <= TOLERANCES[f.dtype] if e.any() else not f.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, activation):
    leaves, of_y = arguments(shape, dtype)
    found = results(gated, leaves, of_y, activation=activation, impl="triton")
    assert [f.dtype for f in found] == [dtype, dtype, dtype, torch.float32]
    assert_close(found, exact(leaves, of_y, activation=activation))


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_kind(mask):
    leaves, of_y = arguments((3, 37), mask=mask, mask_dtype=torch.float16)
    assert_close(results(gated, leaves, of_y, impl="triton"), exact(leaves, of_y))


@pytest.mark.parametrize("shape", [(0, 37), (3, 0)])
def test_nothing_to_do(shape):
    leaves, of_y = arguments(shape)
    found = results(gated, leaves, of_y, impl="triton")
    assert [f.shape for f in found] == [shape, shape, shape, shape[-1:]]
    assert not found[-1].any()


@pytest.mark.parametrize("at_once", [True, False])
def test_gradients_that_are_not_needed_are_not_made(at_once):
    """A frozen mask gets none; a mask alone gets the same as with the rest."""
    leaves, of_y = arguments((17, 37))
    whole = results(gated, leaves, of_y, impl="triton")
    frozen = [leaf if (i == 2) is at_once else leaf.detach() for i, leaf in enumerate(leaves)]
    needed = [leaf for leaf in frozen if leaf.requires_grad]
    y = gated(*frozen, impl="triton")
    found = torch.autograd.grad(y, needed, of_y)
    assert all(torch.equal(f, w) for f, w in zip(found, whole[3:] if at_once else whole[1:3], strict=True))


def test_halves_of_a_packed_tensor_are_read_where_they_lie():
    from atp.ops.kernels.gated import as_rows  # noqa: PLC0415 - triton is optional

    gate, up = torch.randn(2, 3, 10).split(5, -1)
    for half in (gate, up):
        assert as_rows(half).data_ptr() == half.data_ptr()
        assert torch.equal(as_rows(half), half.flatten(0, 1))


def test_features_that_are_not_adjacent():
    leaves, of_y = arguments((3, 37))
    strided = [leaf.detach().T.contiguous().T.requires_grad_() for leaf in leaves[:2]] + [
        leaves[2].detach().repeat_interleave(2)[::2].requires_grad_()
    ]
    assert not any(leaf.is_contiguous() for leaf in strided)
    found = results(gated, strided, of_y[:1].expand(3, -1), impl="triton")
    assert_close(found, exact(leaves, of_y[:1].expand(3, -1)))


def test_two_runs_agree_in_every_bit():
    leaves, of_y = arguments((70, 37), torch.float16)
    runs = [results(gated, leaves, of_y, impl="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("mask", ["soft", "none at all"])
def test_operations_are_registered_as_torch_wants_them(mask):
    leaves, of_y = arguments((3, 5), mask=mask)
    given = [*leaves, None][:3]
    torch.library.opcheck(_gated, (*given, "silu"))
    given = [leaf if leaf is None else leaf.detach() for leaf in given]
    torch.library.opcheck(_gated_backward, (of_y, *given, "silu", mask == "soft"))


@pytest.mark.parametrize("mask", ["soft", "none at all"])
def test_compiles_into_one_graph(mask):
    leaves, of_y = arguments((3, 37), mask=mask)
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    found, expected = (results(f, leaves, of_y, impl="triton") for f in (compiled, gated))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
