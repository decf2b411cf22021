"""Compensation: what a final decision leaves is made to stand in for what it takes, before LoRA goes on.

weights   every layer whose inputs are pruned: its kept columns refitted in the least-squares sense (`criteria.surgeon`)
follow    the same; of the final decision from the weights as they were at first, and writers and the MLPs' readers
          block by block, so that the pruned stream follows the dense one (`training.propagation`)
bias      the mean of what pruned inputs contributed goes into the layer's bias (FLAP, arXiv 2312.11983)

The base weights of those layers change, so they are part of a run's saved state. Not covered: what pruned rows wrote
(space `disp`), which nothing that stays can make up for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atp.criteria.statistics import Batches, input_grams, input_moments
from atp.criteria.surgeon import refitted_base
from atp.errors import UnsupportedModelError
from atp.layers import Attachment
from atp.passes import evaluating
from atp.structure.discovery import Block
from atp.structure.live import base_layer, effective_weight, is_quantised
from atp.structure.sharding import held, is_sharded, part, put, settle, shards_of, whole
from atp.structure.space import PrunableLinear
from atp.training.propagation import follow

_REFITS = ("weights", "follow")


class Compensation:
    """Applied when groups go for good.

    Args:
        how: `"none"`, `"bias"`, `"weights"`, `"follow"`, or `"auto"`: `"follow"` where weights are floating point,
            else nothing.
        forward: runs the model on one batch, under the masks as they are.
        batches: what it measures on.
        at_hand: keep what layers held at first where they compute, not on the CPU, for `undone` at every step.
        compact: compute only what is kept while the stream is followed, where layers are plain.
        reader_rounds: of `"follow"` (`training.refitting`).
        quiet: no progress bars.

    Attributes:
        final_batches: what it measures on when nothing more will go; `batches` unless set.
        grams: Gram matrices of layers' inputs in the model as it is, by path, if somebody has measured them; used
            and forgotten by `apply`.

    Raises:
        UnsupportedModelError: where weights of a quantised model would have to change.
    """

    def __init__(
        self,
        how: str,
        attachment: Attachment,
        forward: Callable[[Any], object],
        batches: Batches,
        at_hand: bool = False,
        compact: bool = True,
        reader_rounds: int = 1,
        quiet: bool = False,
    ) -> None:
        self._attachment, self._forward, self._batches = attachment, forward, batches
        self._at_hand, self._compact, self._quiet = at_hand, compact, quiet
        self._reader_rounds = reader_rounds
        self.final_batches = batches
        self._linears = {linear.path: linear for linear in attachment.space.linears if linear.mask_cols}
        blocks = attachment.space.structure.blocks
        writing = [path for block in blocks for path in (block.attention.writer.path, block.mlp.writer.path)]
        self._writers = [p for p in writing if p in self._linears or attachment.space.name != "disp"]
        self._mlp_readers = [reader.path for block in blocks for reader in block.mlp.readers]
        changing = (*self._linears, *self._mlp_readers)
        quantised = [path for path in changing if is_quantised(base_layer(attachment.modules[path]))]
        if how in _REFITS and quantised:
            raise UnsupportedModelError(
                f"compensate={how!r} cannot rewrite {quantised[0]}: its weight is quantised: use 'bias' or 'auto'"
            )
        if how == "bias" and any(is_sharded(base_layer(attachment.modules[path]).weight) for path in self._linears):
            raise UnsupportedModelError(
                "compensate='bias' cannot add biases to layers that are sharded over processes: use 'auto' or 'none'"
            )
        self.how = ("none" if quantised else "follow") if how == "auto" else how
        self.grams: dict[str, Tensor] = {}
        self._applied: tuple[str, ...] = ()
        self._originals: dict[str, Tensor | None] = {}

    @torch.no_grad()
    def apply(self, decision: Mapping[str, Tensor], before: Mapping[str, Tensor], final: bool = True) -> None:
        """Change the base weights of every layer that loses inputs; masks are left as they were.

        Args:
            decision: what is left from now on.
            before: what was left, and has been compensated for already; `decision` is a part of it. Where it is
                everything, whatever an earlier call made of the weights is undone first.
            final: whether nothing more will go; only then does the pruned stream follow the dense one, and `before`
                does not matter to `"follow"`, which begins with the weights as they were at first.
        """
        if self.how == "none":
            return
        if final and self.final_batches is not self._batches:
            self.forget()  # it was measured on fewer
        batches = self.final_batches if final else self._batches
        with self._measuring():
            self._apply(decision, before, batches, self._reader_rounds if final else None, self._quiet)

    @contextmanager
    def on_trial(self, decision: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the model is what `apply` would make of it under a final `decision`, but for MLPs' readers.

        They stay as they are, and `batches` is what it is measured on. Nothing may be pruned before; afterwards
        everything is as it was.
        """
        grams, full = dict(self.grams), self._attachment.space.full()
        try:
            with self._measuring():
                self._apply(decision, full, self._batches, reader_rounds=0, quiet=True)
            self._attachment.set_masks(decision)
            if self._compact:
                self._attachment.compact()
            yield
        finally:
            self._attachment.set_masks(full)
            self.undo()
            self.grams.update(grams)

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        settle(self._attachment.lm)
        with evaluating(self._attachment.lm), self._attachment.plainly():
            yield

    def _apply(
        self,
        decision: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        batches: Batches,
        reader_rounds: int | None,
        quiet: bool,
    ) -> None:
        """As `apply`; `reader_rounds`: None where more will go, so that no stream is followed."""
        rounds = reader_rounds if self.how == "follow" else None
        if rounds is not None:
            before = self._attachment.space.full()
        had = {path: _kept_inputs(linear, before) for path, linear in self._linears.items()}
        keep = {path: _kept_inputs(linear, decision) for path, linear in self._linears.items()}
        writers = () if rounds is None else self._writers
        alone = [p for p in self._linears if p not in writers and not torch.equal(had[p], keep[p])]
        losing = {path: self._attachment.modules[path] for path in alone}
        if all(inputs.all() for inputs in had.values()):
            self._revert_all()
        self._claim(losing)
        with self._masks(before):
            if self.refits:
                grams = self._grams_of(losing, batches)
                found = {p: self._own_part(p, refitted_base(losing[p], gram, had[p], keep[p])) for p, gram in grams}
            else:
                moments = input_moments(losing, self._forward, batches)
                found = {path: self._shifted(path, m.mean, had[path] & ~keep[path]) for path, m in moments.items()}
        for path, tensor in found.items():  # not before all have been measured
            self._put(path, tensor)
        if rounds is not None:
            self._claim((*writers, *self._mlp_readers))
            with self._masks(decision):
                kept = {path: keep.get(path) for path in writers}
                follow(
                    self._attachment,
                    kept,
                    self._dense_block,
                    self._forward,
                    batches,
                    compact=self._compact,
                    reader_rounds=rounds,
                    quiet=quiet,
                )

    @property
    def refits(self) -> bool:
        """Whether it changes weights, by Gram matrices."""
        return self.how in _REFITS

    def forget(self) -> None:
        """Drop what has been measured: the model is about to change."""
        self.grams.clear()

    def state(self) -> dict[str, Tensor]:
        """The parameters that were changed, by `path.weight` or `path.bias`."""
        layers = {path: base_layer(self._attachment.modules[path]) for path in self._applied}
        return {f"{path}.{self._tensor}": getattr(layer, self._tensor) for path, layer in layers.items()}

    def undo(self) -> None:
        """Put back what changed layers held at first."""
        settle(self._attachment.lm)
        self._revert_all()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, which may be nothing."""
        self.undo()
        self._claim(name.rsplit(".", 1)[0] for name in tensors)
        load_compensated(self._attachment, tensors)

    def _claim(self, paths: Iterable[str]) -> None:
        """Layers that are about to change: keep what the base model holds there, where it is not kept already."""
        self._applied = tuple(dict.fromkeys((*self._applied, *paths)))
        for path in self._applied:
            if path not in self._originals:
                tensor = getattr(base_layer(self._attachment.modules[path]), self._tensor)
                place = "cpu" if tensor is None or not self._at_hand else tensor.device
                self._originals[path] = None if tensor is None else held(tensor).to(place, copy=True)

    def _grams_of(self, losing: Mapping[str, nn.Module], batches: Batches) -> Iterator[tuple[str, Tensor]]:
        """Gram matrices of the layers' inputs: those at hand, and the others measured."""
        ready = {path: self.grams[path] for path in losing if path in self.grams}
        self.grams.clear()
        rest = {path: layer for path, layer in losing.items() if path not in ready}
        while ready:
            path = next(iter(ready))
            yield path, ready.pop(path)
        yield from input_grams(rest, self._forward, batches)

    def _shifted(self, path: str, mean: Tensor, lost: Tensor) -> Tensor:
        """The bias with the mean of what the `lost` inputs contributed."""
        module = self._attachment.modules[path]
        layer = base_layer(module)
        moved = effective_weight(module).cpu()[:, lost] @ mean[lost]
        return moved if layer.bias is None else layer.bias.cpu() + moved.to(layer.bias.dtype)

    @contextmanager
    def _masks(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        before = self._attachment.decision()
        self._attachment.set_masks(values)
        try:
            yield
        finally:
            self._attachment.set_masks(before)

    @property
    def is_undoable(self) -> bool:
        """Whether a pass of the whole model can be made within `undone`.

        Not where an engine puts its own weights, whole, in place of those it holds in parts, when a block is called.
        """
        return not any(is_sharded(base_layer(self._attachment.modules[path]).weight) for path in self._applied)

    @contextmanager
    def undone(self, paths: Iterable[str] | None = None) -> Iterator[None]:
        """Within it, changed layers (of `paths`, or all) hold what they held at first."""
        paths = self._applied if paths is None else paths
        bases = {path: base_layer(self._attachment.modules[path]) for path in paths}
        changed = {path: getattr(base, self._tensor) for path, base in bases.items() if path in self._applied}
        for path in changed:
            setattr(bases[path], self._tensor, self._original(path, bases[path].weight))
        try:
            yield
        finally:
            for path, tensor in changed.items():
                setattr(bases[path], self._tensor, tensor)

    @contextmanager
    def _dense_block(self, block: Block) -> Iterator[None]:
        """One block as it was before anything was removed; adapters stay on."""
        paths = [linear.path for linear in block.linears]
        with self.undone(paths), self._attachment.lifted(paths):
            yield

    def _original(self, path: str, weight: Tensor) -> nn.Parameter | None:
        tensor, lasting = self._originals[path], shards_of(weight)
        if tensor is not None and is_sharded(lasting):
            tensor = whole(lasting, instead=tensor)
        return None if tensor is None else nn.Parameter(tensor.to(weight.device), requires_grad=False)

    def _own_part(self, path: str, weight: Tensor) -> Tensor:
        """What this process will hold of a layer's new weight, on the CPU."""
        return part(base_layer(self._attachment.modules[path]).weight, weight).to("cpu", copy=True)

    def _revert_all(self) -> None:
        for path in self._applied:
            self._put(path, self._originals[path])
        self._applied = ()

    def _put(self, path: str, tensor: Tensor | None) -> None:
        _put(base_layer(self._attachment.modules[path]), self._tensor, tensor)

    @property
    def _tensor(self) -> str:
        return "weight" if self.refits else "bias"


def load_compensated(attachment: Attachment, tensors: Mapping[str, Tensor]) -> None:
    """Write saved tensors, by `path.weight` or `path.bias`, into the base layers of a live model."""
    for key, tensor in tensors.items():
        path, name = key.rsplit(".", 1)
        base = base_layer(attachment.modules[path])
        _put(base, name, part(base.weight, tensor) if name == "weight" else tensor)


@torch.no_grad()
def _put(base: nn.Linear, name: str, tensor: Tensor | None) -> None:
    """Make `tensor` what this process holds of the weight or the bias of a layer; None takes the bias away."""
    if tensor is None:
        base.register_parameter(name, None)
        return
    if getattr(base, name) is None:
        setattr(base, name, _frozen_bias(base))
    put(getattr(base, name), tensor)


def _kept_inputs(linear: PrunableLinear, decision: Mapping[str, Tensor]) -> Tensor:
    """Which input features stay, bool, `(in_features,)`."""
    assert linear.cols is not None
    return decision[linear.cols.set].cpu()[linear.cols.owner] > 0


def _frozen_bias(base: nn.Linear) -> nn.Parameter:
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.zeros(base.out_features, dtype=dtype, device=base.weight.device), requires_grad=False)
