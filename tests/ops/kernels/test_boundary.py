"""The boundary's kernels. Oracles: the eager definition in float64, of the same numbers; `index_add`, in every bit."""

import pytest
import torch

from atp.ops.boundary import _add_norm_gather, _add_norm_gather_backward, add_norm_gather, add_norm_gather_eager
from atp.ops.selection import Selection
from tests import families
from tests.ops.kernels import in_the_interpreter

pytestmark = in_the_interpreter

TOLERANCES = {torch.float32: 1e-6, torch.float16: 4e-4}

SHAPES = [(1, 1), (1, 37), (3, 96), (17, 131), (2, 2, 576)]
"""Leading dimensions, hidden size: a program with one row and with several, blocks with and without a rest."""

KEEP = {
    "some": lambda feature: feature % 3 != 1,
    "others": lambda feature: feature % 5 > 2,
    "all": lambda feature: feature >= 0,
    "one": lambda feature: feature == len(feature) - 1,
    "none": lambda feature: feature < 0,
}

CASES = {
    "dense": {},
    "soft masks": {"mask": True, "offset": 1.0},
    "hard masks": {"written": "some", "read": "others"},
    "both": {"written": "others", "read": "some", "mask": True, "offset": 1.0},
    "written alone": {"written": "some"},
    "read alone": {"read": "some", "mask": True},
    "all kept": {"written": "all", "read": "all"},
    "one kept": {"written": "one", "read": "one", "mask": True},
    "none kept": {"written": "none", "read": "none", "mask": True},
    "no update": {"update": False, "read": "some"},
    "no update, dense": {"update": False},
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def sums_kept(monkeypatch):
    """Whether each backward pass kept sums over rows. Four programs make it, so that some take several rows."""
    from atp.ops.kernels import boundary as kernels  # noqa: PLC0415 - triton is optional

    kept = []

    def four_programs(num_warps, sums):
        kept.append(sums)
        return 4

    monkeypatch.setattr(kernels, "resident_programs", four_programs)
    return kept


def arguments(shape, dtype=torch.float32, update=True, mask=False, written=None, read=None, offset=0.0):
    """Leaves by name, what else is given, and the gradients that r' and n shall have."""
    torch.manual_seed(0)
    *batch, hidden_size = shape
    names = {"written": written, "read": read}
    keep = {n: KEEP[k or "all"](torch.arange(hidden_size)) for n, k in names.items()}
    width, read_width = (int(k.sum()) for k in keep.values())
    made = {"residual": torch.randn(shape, dtype=dtype), "weight": torch.randn(hidden_size)}
    if update:
        made["update"] = torch.randn(*batch, width, dtype=dtype)
    if mask:
        made["update_mask"] = torch.rand(width)
    leaves = {name: among_nans(leaf).requires_grad_() for name, leaf in made.items()}
    options = {n: Selection.of(keep[n]) for n, k in names.items() if k} | {"offset": offset}
    return leaves, options, [among_nans(torch.randn(*batch, w, dtype=dtype)) for w in (hidden_size, read_width)]


def among_nans(x):
    """The same numbers, where what lies before and after them in memory is NaN."""
    memory = torch.full((x.numel() + 2048,), torch.nan, dtype=x.dtype)
    return memory[1024 : 1024 + x.numel()].view(x.shape).copy_(x)


def results(function, leaves, options, gradients, **how):
    """r', n, and the gradients of those leaves that want one."""
    outputs = function(**{"update": None, **leaves}, eps=1e-5, **options, **how)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, gradients)]


def exact(leaves, options, gradients):
    doubles = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    return results(add_norm_gather_eager, doubles, options, [g.double() for g in gradients])


def errors(found, expected):
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert not any(f.any() for f, e in zip(found, expected, strict=True) if not e.any())
    return [families.relative_error(f.double(), e) if e.any() else 0 for f, e in zip(found, expected, strict=True)]


def assert_close(found, expected, tolerance):
    assert max(errors(found, expected)) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, shape, dtype):
    """A single number, or a small difference, errs more than that in any arithmetic: no more than the definition's."""
    given = arguments(shape, dtype, **CASES[case])
    found, definition = (results(add_norm_gather, *given, impl=impl) for impl in ("triton", "eager"))
    expected = exact(*given)
    assert [f.dtype for f in found[2:]] == [leaf.dtype for leaf in given[0].values()]
    slack = torch.finfo(dtype).eps / 8
    pairs = zip(errors(found, expected), errors(definition, expected), strict=True)
    assert all(error <= max(TOLERANCES[dtype], limit + slack) for error, limit in pairs)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("keep", KEEP)
def test_a_residual_is_in_every_bit_that_of_index_add(keep, dtype):
    leaves, options, _ = arguments((3, 131), dtype, written=keep)
    summed, _ = add_norm_gather(**leaves, eps=1e-5, **options, impl="triton")
    assert torch.equal(summed, leaves["residual"].index_add(-1, options["written"].index, leaves["update"]))


def test_the_norm_reads_the_residual_as_it_was_rounded():
    leaves, options, _ = arguments((3, 131), torch.float16, mask=True, read="some")
    summed, n = add_norm_gather(**leaves, eps=1e-5, **options, impl="triton")
    _, again = add_norm_gather(summed, None, leaves["weight"], 1e-5, **options, impl="triton")
    assert torch.equal(n, again)


@pytest.mark.parametrize(("used", "unused"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("case", ["dense", "both"])
def test_an_output_that_nothing_uses(case, used, unused):
    leaves, options, gradients = arguments((3, 37), **CASES[case])
    outputs = add_norm_gather(**leaves, eps=1e-5, **options, impl="triton")
    found = torch.autograd.grad(outputs[used], leaves.values(), gradients[used], materialize_grads=True)
    gradients[unused] = torch.zeros_like(gradients[unused])
    assert_close(found, exact(leaves, options, gradients)[2:], 1e-6)


@pytest.mark.parametrize(
    ("frozen", "sums"),
    [({"weight"}, True), ({"update_mask"}, True), ({"weight", "update_mask"}, False), ({"residual", "update"}, True)],
)
def test_gradients_that_are_not_needed_are_not_made(frozen, sums, sums_kept):
    leaves, options, gradients = arguments((5, 37), **CASES["both"])
    whole = results(add_norm_gather, leaves, options, gradients, impl="triton")
    expected = whole[:2] + [w for name, w in zip(leaves, whole[2:], strict=True) if name not in frozen]
    leaves = {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}
    found = results(add_norm_gather, leaves, options, gradients, impl="triton")
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert sums_kept == [True, sums]


@pytest.mark.parametrize("case", ["dense", "soft masks", "hard masks"])
@pytest.mark.parametrize(("residual", "update"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_an_update_of_another_dtype(residual, update, case):
    """As autocast makes it. Its gradient, too, is rounded to the residual's dtype."""
    leaves, *rest = arguments((3, 37), residual, **CASES[case])
    leaves["update"] = leaves["update"].detach().to(update).requires_grad_()
    found = results(add_norm_gather, leaves, *rest, impl="triton")
    assert [f.dtype for f in found[2:]] == [leaf.dtype for leaf in leaves.values()]
    assert_close(found, exact(leaves, *rest), TOLERANCES[torch.float16])


def test_features_that_are_not_adjacent():
    leaves, options, gradients = arguments((3, 37), **CASES["both"])
    strided = {name: leaf.detach().repeat_interleave(2, -1)[..., ::2] for name, leaf in leaves.items()}
    assert not any(leaf.is_contiguous() for leaf in strided.values())
    strided = {name: leaf.requires_grad_() for name, leaf in strided.items()}
    gradients = [g[:1].expand_as(g) for g in gradients]
    assert_close(
        results(add_norm_gather, strided, options, gradients, impl="triton"), exact(leaves, options, gradients), 1e-6
    )


def test_no_rows():
    leaves, *rest = arguments((0, 37), **CASES["both"])
    found = results(add_norm_gather, leaves, *rest, impl="triton")
    assert [f.shape for f in found] == [f.shape for f in exact(leaves, *rest)]
    assert not any(f.any() for f in found)


def test_two_runs_agree_in_every_bit():
    given = arguments((17, 131), torch.float16, **CASES["both"])
    runs = [results(add_norm_gather, *given, impl="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", ["dense", "both", "no update"])
def test_operations_are_registered_as_torch_wants_them(case):
    leaves, options, (of_summed, of_normed) = arguments((3, 5), **CASES[case])
    update, mask, weight = (leaves.get(name) for name in ("update", "update_mask", "weight"))
    read, written = (options.get(name) for name in ("read", "written"))
    given = [read and read.index, read and read.position, written and written.index, written and written.position]
    torch.library.opcheck(_add_norm_gather, (leaves["residual"], update, *given, weight, mask, 1e-5, 1.0))
    given = [of_summed if update is not None else None, of_normed, leaves["residual"], weight, read and read.position]
    given += [update if mask is not None else None, mask, written and written.index]
    given = [g if g is None else g.detach() for g in given]
    torch.library.opcheck(_add_norm_gather_backward, (*given, 1e-5, 1.0, mask is not None))


@pytest.mark.parametrize("case", ["dense", "both", "no update"])
def test_compiles_into_one_graph(case):
    given = arguments((3, 37), **CASES[case])
    compiled = torch.compile(add_norm_gather, fullgraph=True, backend="aot_eager")
    found, expected = (results(f, *given, impl="triton") for f in (compiled, add_norm_gather))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
