"""Kept features and all features. Oracle: boolean indexing."""

import torch

from atp.ops import selection


def test_gathering_and_scattering_undo_each_other_and_have_each_others_gradients():
    keep = torch.tensor([True, False, True, True, False])
    kept = selection.Selection.of(keep)
    assert kept.position.tolist() == [0, -1, 1, 2, -1]
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(selection.gather_features(x, kept.index), x[..., keep])
    spread = selection.scatter_features(y, kept.index, 5)
    assert torch.equal(spread[..., keep], y)
    assert not spread[..., ~keep].any()
    assert torch.autograd.gradcheck(lambda x: selection.gather_features(x, kept.index), x)
    assert torch.autograd.gradcheck(lambda y: selection.scatter_features(y, kept.index, 5), y)
