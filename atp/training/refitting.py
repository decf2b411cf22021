"""Refitting a part of a block to what it should write: a writer by least squares, an MLP's readers by Gauss-Newton.

A writer mixes what the channels that stay compute. Refitted readers change what they compute, so that they stand in for
those that go. With h = f(z_1, z_2), z_r = W_r x + b_r (gate and up, or up alone; f works channel by channel), D the
writer's kept columns, m what the output lacks, and a_r = df/dz_r as things stand:

    minimise over V   sum over tokens |D sum_r a_r * (V_r x) - m|^2 + sum_r pull_r |V_r|^2,     W_r <- W_r + V_r

by a few conjugate gradients, preconditioned as by K-FAC (arXiv 1503.05671): (DᵀD * mean a aᵀ) (x) mean x xᵀ. The
gradient is that of all tokens, the curvature that of a draw, as in subsampled Newton methods (arXiv 1601.04737). f is
not linear, so the step is halved until the output lacks less, or not taken; and there may be several rounds, each of
another draw, all but the last by the gradient of their draw.

Where several processes run, each is given its own batches, and all refit to those of all.

Not covered: attention's readers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atp.criteria.ridge import Ridge
from atp.criteria.surgeon import typical
from atp.layers import Attachment, base_changed
from atp.passes import inputs_of, removed_after
from atp.processes import counted, summed
from atp.structure.discovery import MLP
from atp.structure.live import adapter_delta, base_layer, effective_bias
from atp.structure.space import Axis

PRIOR = 0.3
"""Pull of a writer towards what it was, relative to what a typical input holds. SmolLM2-135M, 40 % of width, 64 rows
and 1,024 one-token inputs, nats a token: 3.193 at 0.1, 3.175 at 0.3, 3.180 at 1."""

READER_PRIOR = 0.3
"""Likewise of a reader, relative to what a typical input holds times what a typical channel does."""

READER_STEPS = 3
"""Conjugate gradients. As above, with all tokens for readers: 3.127 at 3, 3.118 at 8, 3.175 with writers only."""

READER_TOKENS = 16
"""Tokens a kept channel, drawn from all, that readers' curvature and step size and a first fit of the writer look at;
readers' gradient and the writer look at all."""

AT_ONCE = 4096
"""Tokens of them that pass through the MLP together."""

STEP_SIZES = (1.0, 0.5, 0.25)

Wanted = Iterable[tuple[Tensor, Tensor | None]]
"""What a writer should write, `(rows, tokens, out_features)`, and what each token counts (None: 1), a batch each."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Gate, or up: the rows of kept channels in one layer, which holds both where they are packed."""

    layer: nn.Module
    rows: Tensor

    def add(self, change: Tensor) -> None:
        """Add `change`, `(channels, in_features)`, to the base weight."""
        weight = base_layer(self.layer).weight
        weight[self.rows] += change.to(weight.dtype)
        base_changed(self.layer)


@dataclass(frozen=True, eq=False)
class KeptMLP:
    """What stays of one MLP.

    Attributes:
        module, writer: live.
        readers: of the same channels in the same order.
        channels: positions of kept channels.
        inputs, outputs: which stay of what readers read and of what the writer writes, `(hidden_size,)`, 0 or 1.
    """

    module: nn.Module
    writer: nn.Module
    readers: tuple[Reader, ...]
    channels: Tensor
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, attachment: Attachment, mlp: MLP) -> "KeptMLP":
        """By the masks as they are."""
        linears = {linear.path: linear for linear in attachment.space.linears}

        def kept(path: str, axis: Axis | None, features: int) -> Tensor:
            device = base_layer(attachment.modules[path]).weight.device
            if axis is None:
                return torch.ones(features, device=device)
            return attachment.masks[axis.set].detach().to(device)[axis.owner_on(device)]

        readers = []
        for reader in mlp.readers:
            linear = linears[reader.path]
            rows = torch.nonzero(kept(linear.path, linear.rows, linear.out_features)).flatten()
            readers += [Reader(attachment.modules[linear.path], part) for part in rows.chunk(len(reader.packs))]
        first, writer = linears[mlp.readers[0].path], linears[mlp.writer.path]
        return cls(
            attachment.lm.get_submodule(mlp.path),
            attachment.modules[writer.path],
            tuple(readers),
            torch.nonzero(kept(writer.path, writer.cols, writer.in_features)).flatten(),
            kept(first.path, first.cols, first.in_features),
            kept(writer.path, writer.rows, writer.out_features),
        )

    def hidden(self, x: Tensor) -> Tensor:
        """What kept channels give, `(rows, tokens, channels)`, for what enters the MLP."""
        return _of_kept(inputs_of(self.writer, self.module, x), self.channels)


class _Batch(NamedTuple):
    """What enters the MLP, what its writer should write, `(rows, tokens, features)`, and what each token counts."""

    x: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class _Tokens:
    """What readers read, `(tokens, inputs)`, a, `(readers, tokens, channels)`, and m, `(tokens, out)`, of one batch."""

    inputs: Tensor
    slopes: Tensor
    missing: Tensor


@torch.no_grad()
def refit_writer(writer: nn.Module, keep: Tensor | None, inputs: Iterable[Tensor], wanted: Wanted) -> None:
    """Refit kept columns in place.

    Args:
        keep: which inputs stay, bool, `(in_features,)`; None: all.
        inputs: all of them, or those that stay, a batch each, `(rows, tokens, features)`.
    """
    base = base_layer(writer)
    keep = torch.ones(base.in_features, dtype=torch.bool) if keep is None else keep
    kept = torch.nonzero(keep).flatten().to(base.weight.device)
    base.weight[:, kept] += _writer_change(writer, kept, inputs, wanted).to(base.weight.dtype)
    base_changed(writer)


@torch.no_grad()
def refit_readers(
    attachment: Attachment,
    mlp: MLP,
    entering: list[Tensor],
    wanted: Callable[[], Wanted],
    seeds: Sequence[int],
    rounds: int = 1,
) -> None:
    """Refit the kept part of an MLP's readers in place, for a writer that is refitted afterwards; that stays as it is.

    SmolLM2-135M and Gemma-3-270M, medical, 40 % of width, 64 rows, not trained on, nats a token: 3.123 and 2.948 after
    one round, 3.112 and 2.931 after two.

    Args:
        attachment: under the masks that are final.
        entering: what the MLP is given, a batch each, `(rows, tokens, hidden_size)`.
        wanted: what its writer should write.
        seeds: of the tokens drawn, a batch each.
        rounds: Gauss-Newton steps, at least one.
    """
    kept = KeptMLP.of(attachment, mlp)
    last = rounds - 1
    for turn in range(last):
        _round(kept, _drawn(kept, entering, wanted(), seeds, turn))
    _round(kept, _drawn(kept, entering, wanted(), seeds, last), _batches(kept, entering, wanted()))


def _round(kept: KeptMLP, drawn: list[_Batch], every: Iterable[_Batch] | None = None) -> None:
    """One Gauss-Newton step around where readers stand.

    Args:
        drawn: what the curvature and the size of the step are of, and of the writer a fit that is not kept.
        every: what the gradient is of; None: of the same.
    """
    hidden = (kept.hidden(batch.x) for batch in drawn)
    columns = _effective(kept.writer)[:, kept.channels]
    columns = columns + _writer_change(kept.writer, kept.channels, hidden, ((b.target, b.weight) for b in drawn))
    tokens = [_tokens(kept, columns, batch) for batch in drawn]
    written = columns * kept.outputs[:, None]
    gradient = _gradient(tokens if every is None else (_tokens(kept, columns, b) for b in every), written)
    with _in_float32(columns):
        change = _reader_change(tokens, gradient, written)

    def error() -> float:
        return _size(_missing(kept, columns, kept.hidden(batch.x), batch) for batch in drawn)

    _step(kept.readers, change, _size(t.missing for t in tokens), error)


def _step(readers: Sequence[Reader], change: Iterable[Tensor], was: float, error: Callable[[], float]) -> None:
    """Take the largest of `STEP_SIZES` that makes `error()` less than it was, or none."""
    before = {reader.layer: base_layer(reader.layer).weight.clone() for reader in readers}
    for size in STEP_SIZES:
        for reader, part in zip(readers, change, strict=True):
            reader.add(size * part)
        if error() < was:
            return
        for layer, weight in before.items():
            base_layer(layer).weight.copy_(weight)
            base_changed(layer)


def _missing(kept: KeptMLP, columns: Tensor, hidden: Tensor, batch: _Batch) -> Tensor:
    """m, `(tokens, out_features)`, with `columns` for the writer's."""
    bias = effective_bias(kept.writer)
    with _in_float32(hidden):
        off = batch.target.float() - hidden.float() @ columns.T - (0.0 if bias is None else bias)
    return (off * kept.outputs * batch.weight).flatten(0, -2)


def _size(missing: Iterable[Tensor]) -> float:
    return summed(_sum(off.square().sum() for off in missing)).item()


def _writer_change(writer: nn.Module, kept: Tensor, inputs: Iterable[Tensor], wanted: Wanted) -> Tensor:
    """What least squares add to kept columns, `(out_features, kept)`."""
    ridge = Ridge(_effective(writer)[:, kept], effective_bias(writer))
    for x, (target, weight) in zip(inputs, wanted, strict=True):
        ridge.add(_of_kept(x, kept), target, weight)
    ridge.share()
    return ridge.change(PRIOR)[0]


def _batches(kept: KeptMLP, entering: list[Tensor], wanted: Wanted) -> Iterator[_Batch]:
    """All tokens, as they come."""
    for x, (target, weight) in zip(entering, wanted, strict=True):
        weight = x.new_ones(*x.shape[:-1], 1) if weight is None else weight
        yield _Batch(x * kept.inputs.to(x.dtype), target, weight)


def _drawn(kept: KeptMLP, entering: list[Tensor], wanted: Wanted, seeds: Sequence[int], turn: int) -> list[_Batch]:
    """The same share of each batch, `READER_TOKENS` a channel in all where there are as many, `AT_ONCE` at a time.

    Args:
        turn: how many have been drawn before, of tokens that do not come again before all have come.
    """
    share = READER_TOKENS * len(kept.channels) / counted(sum(x.shape[:-1].numel() for x in entering))
    parts: list[tuple[Tensor, ...]] = []
    for batch, seed in zip(_batches(kept, entering, wanted), seeds, strict=True):
        count = batch.x.shape[:-1].numel()
        taken = max(1, round(share * count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        order = order.roll(-turn * taken)[:taken].to(batch.x.device)
        parts.append(tuple(t.flatten(0, -2)[order] for t in batch))
    chunks = zip(*(torch.cat(part).split(AT_ONCE) for part in zip(*parts, strict=True)), strict=True)
    return [_Batch(x[None], target[None], weight[None]) for x, target, weight in chunks]


def _tokens(kept: KeptMLP, columns: Tensor, batch: _Batch) -> _Tokens:
    """The MLP around where it stands, with `columns` for the writer's."""
    hidden, slopes = _slopes(kept, batch.x)
    inputs = batch.x.flatten(0, -2).float()
    return _Tokens(inputs, (slopes * batch.weight).flatten(1, -2), _missing(kept, columns, hidden, batch))


def _slopes(kept: KeptMLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """What kept channels give, and a, its derivatives by what readers give, `(readers, rows, tokens, channels)`."""
    rows: dict[nn.Module, list[Tensor]] = {}
    for reader in kept.readers:
        rows.setdefault(reader.layer, []).append(reader.rows)
    given: dict[nn.Module, Tensor] = {}

    def leaf(layer: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        given[layer] = output.detach().requires_grad_()
        return given[layer]

    with torch.enable_grad(), removed_after([layer.register_forward_hook(leaf) for layer in rows]):
        hidden = inputs_of(kept.writer, kept.module, x)
        found = dict(zip(given, torch.autograd.grad(hidden.sum(), list(given.values())), strict=True))
    parts = [p for layer, of in rows.items() for p in _of_kept(found[layer], torch.cat(of)).chunk(len(of), -1)]
    return _of_kept(hidden.detach(), kept.channels), torch.stack(parts).float()


def _gradient(tokens: Iterable[_Tokens], columns: Tensor) -> Tensor:
    """The direction in which the output comes to lack less, a mean over tokens, `(readers, channels, inputs)`."""
    total, count = None, 0
    for t in tokens:
        with _in_float32(columns):
            found = ((t.missing @ columns) * t.slopes).mT @ t.inputs
        total = found if total is None else total.add_(found)
        count += len(t.inputs)
    assert total is not None
    return summed(total) / counted(count)


def _reader_change(tokens: list[_Tokens], gradient: Tensor, columns: Tensor) -> Tensor:
    """V, `(readers, channels, inputs)`, by `gradient` of all tokens and the curvature of `tokens`."""
    count = counted(sum(len(t.inputs) for t in tokens))
    together = columns.T @ columns
    read = summed(_sum(t.inputs.T @ t.inputs for t in tokens)) / count
    effect = together * summed(_sum(t.slopes.mT @ t.slopes for t in tokens)) / count
    typically = torch.stack([typical(e) for e in effect])[:, None, None]
    pull = READER_PRIOR * typical(read) * typically
    by_inputs = torch.linalg.inv(_damped(read, typical(read)))
    by_channels = torch.linalg.inv(_damped(effect, typically))

    def product(v: Tensor) -> Tensor:
        found = torch.zeros_like(v)
        for t in tokens:
            written = ((t.inputs @ v.mT) * t.slopes).sum(0)
            found += ((written @ together) * t.slopes).mT @ t.inputs / count
        return summed(found) + pull * v

    left = gradient
    change = torch.zeros_like(left)
    towards = by_channels @ left @ by_inputs
    along, steepness = towards, (left * towards).sum()
    for _ in range(READER_STEPS):
        image = product(along)
        far = steepness / (along * image).sum().clamp_min(torch.finfo(image.dtype).tiny)
        change = change + far * along
        left = left - far * image
        towards = by_channels @ left @ by_inputs
        before, steepness = steepness, (left * towards).sum()
        along = towards + steepness / before.clamp_min(torch.finfo(image.dtype).tiny) * along
    return change


def _in_float32(like: Tensor) -> torch.autocast:
    """The forward pass may be in autocast; what is solved is not."""
    return torch.autocast(like.device.type, enabled=False)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _damped(matrix: Tensor, size: Tensor) -> Tensor:
    return matrix + READER_PRIOR**0.5 * size * torch.eye(matrix.shape[-1], device=matrix.device)


def _effective(layer: nn.Module) -> Tensor:
    weight = base_layer(layer).weight
    with _in_float32(weight):
        return weight.float() + adapter_delta(layer)


def _of_kept(x: Tensor, kept: Tensor) -> Tensor:
    """Kept features of `x`, which may hold only them already."""
    return x if x.shape[-1] == len(kept) else x[..., kept]
