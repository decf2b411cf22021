"""Residual add, RMSNorm and choice of features. Oracles: torch's norm, and finite differences."""

import os
import re

import pytest
import torch
from torch.nn.functional import rms_norm

from atp.ops.boundary import add_norm_gather
from atp.ops.selection import Selection

KEEP = torch.tensor([True, False, True, True, False])
OTHERS = torch.tensor([False, True, True, False, False])

EVERY = slice(None)

CASES = {
    "dense": {},
    "soft masks": {"mask": True, "offset": 1.0},
    "hard masks": {"written": KEEP, "read": OTHERS},
    "both": {"written": OTHERS, "read": KEEP, "mask": True, "offset": 1.0},
    "no update": {"update": False, "read": KEEP},
}


def arguments(update=True, mask=False, written=None, read=None, offset=0.0):
    """Leaves by name."""
    torch.manual_seed(0)
    width = 5 if written is None else int(written.sum())
    shapes = {"residual": (2, 3, 5), "weight": (5,), "update": (2, 3, width), "update_mask": (width,)}
    made = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    return {name: leaf for name, leaf in made.items() if {"update": update, "update_mask": mask}.get(name, True)}


def call(case, leaves, **how):
    selections = {name: Selection.of(case[name]) for name in ("written", "read") if name in case}
    given = {"update": None, "eps": 1e-5, "offset": case.get("offset", 0.0)} | leaves | selections
    return add_norm_gather(**given | how)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_definition_is_the_equation(case):
    leaves = arguments(**case)
    summed = leaves["residual"].detach().clone()
    if "update" in leaves:
        summed[..., case.get("written", EVERY)] += leaves["update"] * leaves.get("update_mask", 1)
    normed = rms_norm(summed, (5,), leaves["weight"] + case.get("offset", 0), 1e-5)
    found = call(case, leaves)
    assert torch.allclose(found[0], summed, rtol=1e-12)
    assert torch.allclose(found[1], normed[..., case.get("read", EVERY)], rtol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_definitions_gradients_are_those_of_finite_differences(case):
    leaves = arguments(**case)
    function = lambda *given: call(case, dict(zip(leaves, given, strict=True)))  # noqa: E731 - of leaves in their order
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def test_float32_inside_and_each_output_rounded_once():
    """The norm reads r' as it was rounded."""
    r, u, w = (leaf.detach().to(torch.bfloat16) for leaf in map(arguments().get, ("residual", "update", "weight")))
    summed, n = add_norm_gather(r, u, w.float(), 1e-5)
    assert torch.equal(summed, (r.float() + u.float()).bfloat16())
    assert torch.equal(n, rms_norm(summed.float(), (5,), w.float(), 1e-5).bfloat16())


def test_without_an_update_the_residual_itself_comes_back():
    leaves = arguments(update=False)
    assert call({}, leaves)[0] is leaves["residual"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight of shape \(4,\): \(5,\) beside a residual \(2, 3, 5\)"),
        ({"update": torch.zeros(2, 3, 4)}, r"update of shape \(2, 3, 4\): \(2, 3, 5\)"),
        ({"update": torch.zeros(3, 5)}, r"update of shape \(3, 5\): \(2, 3, 5\)"),
        ({"written": Selection.of(KEEP)}, r"update of shape \(2, 3, 5\): \(2, 3, 3\)"),
        ({"update_mask": torch.zeros(3)}, r"update_mask of shape \(3,\): \(5,\)"),
        ({"read": Selection.of(torch.ones(6).bool())}, r"read.position of shape \(6,\): \(5,\)"),
        ({"update": None, "update_mask": torch.zeros(5)}, r"only with an update"),
        ({"update": None, "written": Selection.of(KEEP)}, r"only with an update"),
        ({"impl": "cuda"}, r"impl 'cuda': one of"),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call({}, arguments(), **change)


not_in_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, which the interpreter does not"
)


@not_in_the_interpreter
def test_kernels_asked_for_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        call({}, arguments(), impl="triton")


PLAIN = ("residual", "weight", "summed", "normed", "of_summed", "of_normed", "of_residual")
SOFT = {"update": "*bf16", "update_mask": "*fp32", "of_update": "*bf16", "of_weight": "*fp32", "of_mask": "*fp32"}
WRITTEN = {"written_position": "*i32", "written_index": "*i64", "of_update": "*bf16"}
READ = {"read_position": "*i32", "read_index": "*i64"}


@pytest.fixture
def machine_code(tmp_path):
    """Of a kernel for bfloat16, from the arguments that are not None besides those in `PLAIN`."""
    pytest.importorskip("triton")
    from atp.ops.kernels import boundary as kernels  # noqa: PLC0415 - triton is optional
    from tests.ops.sass import sass  # noqa: PLC0415 - as above

    def compiled(name, widths, special):
        kernel = getattr(kernels, name)
        given = dict.fromkeys(PLAIN, "*bf16") | special | kernels.launch_options(*widths)
        given |= {"rows": "i32", "written": "i32:16", "read": "i32:16", "eps": "fp32", "offset": "fp32"}
        warps = given.pop("num_warps")
        return sass(kernel, {argument: given.get(argument) for argument in kernel.arg_names}, tmp_path, warps)

    return compiled


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("widths", "special"),
    [
        ((4096, 4096, 4096), SOFT),
        ((4096, 2752, 1376), {"update": "*bf16"} | WRITTEN | READ),
        ((4096, 2752, 2752), SOFT | WRITTEN | READ),
        ((8192, 8192, 8192), SOFT),
        ((8192, 5504, 5504), {"update": "*bf16"} | WRITTEN | READ),
        ((576, 384, 320), {"update": "*bf16"} | WRITTEN | READ),
        ((576, 576, 320), READ),
    ],
    ids=["soft", "hard", "both", "wide soft", "wide hard", "narrow hard", "no update"],
)
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_an_h100_moves_16_bytes_at_a_time_and_spills_nothing(machine_code, name, widths, special):
    accesses = set(re.findall(r"\b(?:LD|ST)[GL]\b[.\w]*", machine_code(name, widths, special)))
    assert accesses == {"LDG.E.EF.128", "LDG.E.EL.128", "STG.E.128"}
