"""Errors of streams. Oracle: arithmetic by hand."""

import pytest
import torch

from atp.recovery.diagnostics import stream_error


def test_a_token_that_is_lost_counts_once():
    truth = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    off = torch.tensor([[[0.5, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1000.0, 0.0]]])
    found = stream_error([truth + off], [truth])
    assert found.error == pytest.approx((0.25 + 1e6) / 8)
    assert found.relative == pytest.approx((0.25 + 0 + 0 + 1) / 4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_not_finite(value):
    truth = torch.ones(1, 2, 3)
    assert stream_error([truth], [truth]).finite
    assert not stream_error([truth * value], [truth]).finite
