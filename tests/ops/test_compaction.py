"""Kept rows and columns. Oracles: indexing, in every bit, and finite differences in float64."""

import os
import re

import pytest
import torch

from atp.ops.compaction import compact_weight
from atp.ops.selection import Selection

not_in_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, which the interpreter does not"
)

KEPT = {
    "some": [True, False, True, True, False],
    "all": [True] * 5,
    "one": [False] * 4 + [True],
    "none": [False] * 5,
    "not asked": None,
}


def selection(kept):
    return None if KEPT[kept] is None else Selection.of(torch.tensor(KEPT[kept]))


def weight():
    torch.manual_seed(0)
    return torch.randn(5, 5, dtype=torch.float64)


@pytest.mark.parametrize("into", ["a new tensor", "out"])
@pytest.mark.parametrize("cols", KEPT)
@pytest.mark.parametrize("rows", KEPT)
def test_the_definition_is_indexing(rows, cols, into):
    r, c = (torch.tensor([True] * 5 if KEPT[kept] is None else KEPT[kept]) for kept in (rows, cols))
    expected = weight()[r][:, c]
    out = torch.full_like(expected, torch.nan) if into == "out" else None
    found = compact_weight(weight(), selection(rows), selection(cols), out)
    assert torch.equal(found, expected)
    assert out is None or found is out


@pytest.mark.parametrize("cols", KEPT)
@pytest.mark.parametrize("rows", KEPT)
def test_gradients_are_those_of_finite_differences(rows, cols):
    w = weight().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: compact_weight(w, selection(rows), selection(cols)), w)


def test_the_result_shares_no_memory_with_the_weight():
    w = weight()
    compact_weight(w).zero_()
    assert torch.equal(w, weight())


def test_no_gradient_flows_through_out():
    out = torch.empty(3, 5, dtype=torch.float64)
    assert not compact_weight(weight().requires_grad_(), selection("some"), out=out).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(5, 3, dtype=torch.float64)}, r"out is \(5, 3\), torch.float64, and what is kept \(3, 5\)"),
        ({"out": torch.zeros(3, 5)}, r"out is \(3, 5\), torch.float32, and what is kept \(3, 5\), torch.float64"),
        ({"weight": torch.zeros(4, 5)}, r"rows and cols select from \(5, 5\), of a weight \(4, 5\)"),
        ({"impl": "cuda"}, r"impl 'cuda': one of"),
    ],
)
def test_what_it_cannot_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        compact_weight(**{"weight": weight(), "rows": selection("some")} | change)


@not_in_the_interpreter
def test_kernels_asked_for_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        compact_weight(weight(), selection("some"), impl="triton")


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("n_cols", "block"),
    [(14336, (8, 512)), (2752, (8, 512)), (576, (8, 512)), (64, (64, 64)), (16, (256, 16)), (1, (256, 16))],
)
def test_a_program_takes_a_tile_that_fits_the_width(n_cols, block):
    pytest.importorskip("triton")
    from atp.ops.kernels.compaction import tile  # noqa: PLC0415 - triton is optional

    assert tile(n_cols) == block


@not_in_the_interpreter
@pytest.mark.parametrize(
    ("n_cols", "rows", "cols", "loads"),
    [
        (11008, None, "*i64", {"LDG.E.128", "LDG.E.U16"}),
        (2752, "*i64", "*i64", {"LDG.E.128", "LDG.E.64", "LDG.E.U16"}),
        (576, "*i64", None, {"LDG.E.128", "LDG.E.64"}),
        (4096, "*i32", "*i32", {"LDG.E.64", "LDG.E", "LDG.E.U16"}),
        (16, "*i32", None, {"LDG.E.128", "LDG.E"}),
    ],
)
def test_an_h100_moves_16_bytes_at_a_time_and_spills_nothing(tmp_path, n_cols, rows, cols, loads):
    """Where columns are gathered they are loaded one by one, and stored together. Indices come as they will."""
    pytest.importorskip("triton")
    from atp.ops.kernels.compaction import WARPS, gather_kernel, tile  # noqa: PLC0415 - triton is optional
    from tests.ops.sass import sass  # noqa: PLC0415 - as above

    block_rows, block_cols = tile(n_cols)
    strides = dict.fromkeys(("source_row_stride", "out_row_stride"), "i32:16")
    strides |= dict.fromkeys(("source_col_stride", "out_col_stride"), 1)
    sizes = {"n_rows": "i32", "n_cols": "i32:16", "block_rows": block_rows, "block_cols": block_cols}
    tensors = {"source": "*bf16", "rows": rows, "cols": cols, "out": "*bf16"}
    code = sass(gather_kernel, tensors | strides | sizes, tmp_path, WARPS)
    assert set(re.findall(r"\b(?:LD|ST)[GL]\b[.\w]*", code)) == loads | {"STG.E.128"}
