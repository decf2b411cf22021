"""Compensation: what a final decision leaves is made to stand in for what it takes, before LoRA goes on.

weights   every layer whose inputs are pruned: its kept columns refitted in the least-squares sense (`criteria.surgeon`)
bias      the mean of what pruned inputs contributed goes into the layer's bias (FLAP, arXiv 2312.11983)

The base weights of those layers change, so they are part of a run's saved state. Not covered: what pruned rows wrote
(space `disp`), which nothing that stays can make up for.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atp.criteria.statistics import Batches, input_grams, input_moments
from atp.criteria.surgeon import refitted
from atp.errors import UnsupportedModelError
from atp.layers import Attachment
from atp.structure.live import adapter_delta, base_layer, dequantised_weight, is_quantised
from atp.structure.space import PrunableLinear


class Compensation:
    """Applied whenever groups go for good.

    Args:
        how: `"none"`, `"bias"`, `"weights"`, or `"auto"`: weights where they are floating point, else nothing.
        forward: runs the model on one batch, under the masks as they are.

    Raises:
        UnsupportedModelError: where `"weights"` is asked of a quantised model.
    """

    def __init__(
        self,
        how: str,
        attachment: Attachment,
        forward: Callable[[Any], object],
        batches: Batches,
    ) -> None:
        self._attachment, self._forward, self._batches = attachment, forward, batches
        self._linears = {linear.path: linear for linear in attachment.space.linears if linear.mask_cols}
        quantised = [path for path in self._linears if is_quantised(base_layer(attachment.modules[path]))]
        if how == "weights" and quantised:
            raise UnsupportedModelError(
                f"compensate='weights' cannot rewrite {quantised[0]}: its weight is quantised: use 'bias' or 'auto'"
            )
        self.how = ("none" if quantised else "weights") if how == "auto" else how
        self._applied: tuple[str, ...] = ()
        self._originals: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def apply(self, decision: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Change the base weights of every layer that loses inputs, by its inputs in the model as it is now.

        Args:
            decision: what is left from now on.
            before: what was left, and has been compensated for already; `decision` is a part of it. Where it is
                everything, weights are refitted from the original ones, whatever an earlier call made of them.
        """
        if self.how == "none":
            return
        had = {path: _kept_inputs(linear, before) for path, linear in self._linears.items()}
        keep = {path: _kept_inputs(linear, decision) for path, linear in self._linears.items()}
        losing = {p: self._attachment.modules[p] for p in self._linears if not torch.equal(had[p], keep[p])}
        anew = all(inputs.all() for inputs in had.values())
        self._remember(losing)
        if self.how == "weights":
            for path, gram in input_grams(losing, self._forward, self._batches):
                if anew:
                    self._revert(path)
                _refit(losing[path], gram, had[path].to(gram.device), keep[path].to(gram.device))
        else:
            for path, moments in input_moments(losing, self._forward, self._batches).items():
                if anew:
                    self._revert(path)
                _shift(losing[path], moments.mean, had[path] & ~keep[path])
        for path in set(self._applied) - set(losing) if anew else ():
            self._revert(path)
        self._applied = tuple(losing if anew else dict.fromkeys((*self._applied, *losing)))

    def state(self) -> dict[str, Tensor]:
        """The tensors that were changed, by `path.weight` or `path.bias`."""
        layers = {path: base_layer(self._attachment.modules[path]) for path in self._applied}
        return {f"{path}.{self._tensor}": getattr(layer, self._tensor).detach() for path, layer in layers.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, which may be nothing."""
        for path in self._originals:
            self._revert(path)
        self._applied = tuple(name.rsplit(".", 1)[0] for name in tensors)
        self._remember(self._applied)
        load_compensated(self._attachment, tensors)

    def _remember(self, paths: Iterable[str]) -> None:
        """Keep what the base model holds at `paths`, where it is not kept already."""
        for path in paths:
            if path not in self._originals:
                tensor = getattr(base_layer(self._attachment.modules[path]), self._tensor)
                self._originals[path] = None if tensor is None else tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def _revert(self, path: str) -> None:
        base = base_layer(self._attachment.modules[path])
        if path not in self._originals:
            return
        if (original := self._originals[path]) is None:
            base.register_parameter("bias", None)
        else:
            getattr(base, self._tensor).copy_(original)

    @property
    def _tensor(self) -> str:
        return "weight" if self.how == "weights" else "bias"


@torch.no_grad()
def load_compensated(attachment: Attachment, tensors: Mapping[str, Tensor]) -> None:
    """Write saved tensors, by `path.weight` or `path.bias`, into the base layers of a live model."""
    for key, tensor in tensors.items():
        path, name = key.rsplit(".", 1)
        base = base_layer(attachment.modules[path])
        if name == "bias" and base.bias is None:
            base.bias = _frozen_bias(base)
        getattr(base, name).copy_(tensor)


def _kept_inputs(linear: PrunableLinear, decision: Mapping[str, Tensor]) -> Tensor:
    """Which input features stay, bool, `(in_features,)`."""
    assert linear.cols is not None
    return decision[linear.cols.set].cpu()[linear.cols.owner] > 0


def _refit(module: nn.Module, gram: Tensor, had: Tensor, keep: Tensor) -> None:
    """So that base and adapter together, over the kept inputs, do what they did over those it had."""
    weight, delta = base_layer(module).weight, adapter_delta(module)
    weight.copy_(refitted((weight.float() + delta) * had, gram, keep) - delta)


def _shift(module: nn.Module, mean: Tensor, lost: Tensor) -> None:
    """Put the mean of what the `lost` inputs contributed into the bias."""
    base = base_layer(module)
    weight = (dequantised_weight(base).float() + adapter_delta(module)).cpu()
    if base.bias is None:
        base.bias = _frozen_bias(base)
    base.bias.add_((weight[:, lost] @ mean[lost]).to(base.bias))


def _frozen_bias(base: nn.Linear) -> nn.Parameter:
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.zeros(base.out_features, dtype=dtype, device=base.weight.device), requires_grad=False)
