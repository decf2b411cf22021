"""Ridge regression towards what a linear layer is: which change of its weight makes outputs what they should be.

    minimise over V   sum over tokens |(W + V) x + b - t|^2 + prior * typical(G) * |V|^2,      G = sum over tokens x xᵀ

Sums are all that is kept: batches come one after the other, and are not looked at again.
"""

import torch
from torch import Tensor

from atp.criteria.surgeon import typical
from atp.processes import summed


class Ridge:
    """One layer's regression.

    Args:
        weight: W, `(out_features, in_features)`, float32.
        bias: b, `(out_features,)`, or None.
        with_bias: whether the bias is fitted too; it is not pulled towards what it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, with_bias: bool = False) -> None:
        features = weight.shape[1] + with_bias
        self._weight, self._bias, self._with_bias = weight, 0.0 if bias is None else bias.float(), with_bias
        self._gram = weight.new_zeros(features, features)
        self._missing = weight.new_zeros(features, len(weight))

    def add(self, x: Tensor, target: Tensor, counts: Tensor | None = None) -> None:
        """Look at more tokens.

        Args:
            x: inputs, `(..., in_features)`.
            target: t, `(..., out_features)`.
            counts: how much each token counts, `(..., 1)`; None: 1.
        """
        x, off = x.flatten(0, -2).float(), target.flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            off = off - x @ self._weight.T - self._bias
            if self._with_bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            if counts is not None:
                x, off = x * counts.flatten(0, -2), off * counts.flatten(0, -2)
            self._gram.addmm_(x.T, x)
            self._missing.addmm_(x.T, off)

    def share(self) -> None:
        """Add up what all processes have looked at."""
        self._gram, self._missing = summed(self._gram), summed(self._missing)

    def change(self, prior: float) -> tuple[Tensor, Tensor | None]:
        """V, `(out_features, in_features)`, and what is added to the bias, `(out_features,)`, where it is fitted."""
        features = self._weight.shape[1]
        gram = self._gram.clone()
        gram.diagonal()[:features].add_(prior * typical(gram[:features, :features]))
        found = torch.linalg.solve(gram, self._missing).T
        return found[:, :features], found[:, features] if self._with_bias else None
