"""Refitting. Oracles: least squares in float64 over the whole Jacobian; finite differences; writers refitted alone."""

from collections.abc import Iterator

import pytest
import torch

from atp.layers import attach
from atp.structure.building import build_space
from atp.structure.discovery import discover
from atp.structure.live import base_layer
from atp.training import propagation, refitting
from atp.training.refitting import KeptMLP, _gradient, _missing, _reader_change, _size, _slopes, _Tokens
from tests import families
from tests.export.cases import random_masks
from tests.training.test_propagation import EVERYWHERE, SPACES_EVERYWHERE, compensated, last_stream


def kept_mlp(family: str, space: str = "width") -> tuple:
    """The first MLP of a tiny model under masks that keep 0.7 of everything."""
    model = families.with_lora(families.build(family))
    table = build_space(discover(model), space)
    attachment = attach(model, table)
    attachment.set_masks(random_masks(table, 0.3))
    mlp = table.structure.blocks[0].mlp
    return attachment, mlp, KeptMLP.of(attachment, mlp)


def entering(rows: int = 3, tokens: int = 7, hidden: int = 48) -> torch.Tensor:
    return torch.randn(rows, tokens, hidden, generator=torch.Generator().manual_seed(0))


def test_the_change_of_readers_is_the_least_squares_one(monkeypatch) -> None:
    """Oracle: ridge regression on the Jacobian of all outputs by all weights, in float64."""
    readers, channels, inputs, out, tokens = 2, 5, 4, 6, 30
    random = torch.Generator().manual_seed(0)
    a = torch.randn(readers, tokens, channels, generator=random)
    x, missing = torch.randn(tokens, inputs, generator=random), torch.randn(tokens, out, generator=random)
    columns = torch.randn(out, channels, generator=random)
    monkeypatch.setattr(refitting, "READER_PRIOR", 1e-6)
    monkeypatch.setattr(refitting, "READER_STEPS", 200)
    halves = [_Tokens(x[part], a[:, part], missing[part]) for part in (slice(0, 11), slice(11, tokens))]
    jacobian = torch.einsum("oc,rtc,ti->torci", columns, a, x).reshape(tokens * out, -1).double()
    best = torch.linalg.lstsq(jacobian, missing.reshape(-1, 1).double()).solution
    change = _reader_change(halves, _gradient(halves, columns), columns)
    assert families.relative_error(change.reshape(-1, 1).double(), best) <= 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_each_gradient_step_leaves_less(steps: int, monkeypatch) -> None:
    random = torch.Generator().manual_seed(0)
    a, x = torch.randn(2, 40, 9, generator=random), torch.randn(40, 8, generator=random)
    missing, columns = torch.randn(40, 5, generator=random), torch.randn(5, 9, generator=random)

    def left(count: int) -> float:
        monkeypatch.setattr(refitting, "READER_STEPS", count)
        all_tokens = [_Tokens(x, a, missing)]
        change = _reader_change(all_tokens, _gradient(all_tokens, columns), columns)
        return (missing - ((x @ change.mT) * a).sum(0) @ columns.T).square().sum().item()

    assert left(steps) < left(steps - 1)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("family", EVERYWHERE)
def test_slopes_are_those_of_each_channel_by_its_own_readers(family: str, compact: bool) -> None:
    """Oracle: what a kept channel gives where the row of a reader that makes it has been moved a little."""
    attachment, _, kept = kept_mlp(family)
    if compact:
        attachment.compact()
    x = entering()
    far = 1e-3 * torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, slopes = _slopes(kept, x)
        for reader, slope in zip(kept.readers, slopes, strict=True):
            reader.add(far.expand(len(kept.channels), -1))
            moved = kept.hidden(x)
            reader.add(-far.expand(len(kept.channels), -1))
            expected = slope * (x @ far)[..., None]
            assert families.relative_error(moved - hidden, expected) <= 2e-2


@pytest.mark.parametrize(("family", "space"), SPACES_EVERYWHERE)
def test_the_stream_is_followed_better_than_with_writers_alone(family: str, space: str, monkeypatch) -> None:
    dense = last_stream(families.with_lora(families.build(family)))
    errors = []
    for readers_too in (False, True):
        if not readers_too:
            monkeypatch.setattr(propagation, "refit_readers", lambda *_args: None)
        model, attachment, decision, _ = compensated("follow", family, space)
        monkeypatch.undo()
        attachment.set_masks(decision)
        errors.append(families.relative_error(last_stream(model), dense))
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_rows_of_channels_that_stay_are_refitted_and_no_others(family: str) -> None:
    _, attachment, decision, compensation = compensated("follow", family)
    readers = {reader.path for block in attachment.space.structure.blocks for reader in block.mlp.readers}
    with compensation.undone():
        before = {path: base_layer(attachment.modules[path]).weight.clone() for path in readers}
    for linear in attachment.space.linears:
        if linear.path in readers:
            moved = base_layer(attachment.modules[linear.path]).weight - before[linear.path]
            stays = decision[linear.rows.set][linear.rows.owner] > 0
            assert torch.equal(moved.any(dim=1), stays), linear.path


def test_a_change_that_does_not_help_is_not_made(monkeypatch) -> None:
    attachment, mlp, kept = kept_mlp("llama")
    before = {reader.layer: base_layer(reader.layer).weight.clone() for reader in kept.readers}
    monkeypatch.setattr(refitting, "_reader_change", lambda *_args: [torch.full((1, 1), 1e3)] * 2)
    x = entering()
    refitting.refit_readers(attachment, mlp, [x], lambda: [(x, None)], [0])
    for layer, weight in before.items():
        assert torch.equal(base_layer(layer).weight, weight)


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2", "gemma3"])
def test_the_last_gradient_for_readers_is_of_all_tokens_and_curvatures_are_of_two_draws(
    family: str, monkeypatch
) -> None:
    """Oracle: what these tokens lack where the readers have been moved a little, forth and back."""
    attachment, mlp, kept = kept_mlp(family)
    batches = [entering(rows=8, tokens=16) + i for i in range(4)]
    weight = torch.rand(8, 16, 1, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(refitting, "READER_TOKENS", 2)
    own = refitting._reader_change

    def looked_at(tokens: list[_Tokens], gradient: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        assert abs(sum(len(t.inputs) for t in tokens) - 2 * len(kept.channels)) <= len(batches)
        change = own(tokens, gradient, columns)
        wanted = [(x, weight) for x in batches]
        of = refitting._drawn(kept, batches, wanted, range(4), 0), list(refitting._batches(kept, batches, wanted))
        count = sum(b.x.shape[:-1].numel() for b in of[len(seen)])
        lacks = []
        for size in (1e-2, -1e-2):
            for reader, part in zip(kept.readers, change, strict=True):
                reader.add(size * part)
            lacks.append(_size(_missing(kept, columns, kept.hidden(b.x), b) for b in of[len(seen)]))
            for reader, part in zip(kept.readers, change, strict=True):
                reader.add(-size * part)
        expected = -2 * (gradient * change).sum().item() * count
        assert (lacks[0] - lacks[1]) / 2e-2 == pytest.approx(expected, rel=2e-2)
        seen.append(torch.cat([t.inputs for t in tokens]))
        return change

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(refitting, "_reader_change", looked_at)
    refitting.refit_readers(attachment, mlp, batches, lambda: [(x, weight) for x in batches], range(4), rounds=2)
    assert not torch.equal(*seen)


def test_how_many_tokens_pass_at_once_does_not_matter(monkeypatch) -> None:
    found = []
    for at_once in (4096, 10):
        monkeypatch.setattr(refitting, "AT_ONCE", at_once)
        found.append(dict(compensated("follow", "gemma3")[3].state()))
    for name, weight in found[0].items():
        assert families.relative_error(found[1][name], weight) <= 1e-3, name


@pytest.mark.parametrize("step", ["_reader_change", "_gradient", "_writer_change", "_missing"])
def test_what_is_solved_is_in_float32_under_autocast(step: str, monkeypatch) -> None:
    """Oracle: the same computation where only the forward pass has been rounded."""
    attachment, mlp, _ = kept_mlp("llama")
    own, found = getattr(refitting, step), []

    def twice(*args: object) -> torch.Tensor:
        args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
        found.append(own(*args))
        within = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            found.append(own(*args))
        assert within == (step != "_reader_change")
        return found[0]

    monkeypatch.setattr(refitting, step, twice)
    x = entering()
    with torch.autocast("cpu", torch.bfloat16):
        refitting.refit_readers(attachment, mlp, [x], lambda: [(x, None)], [0])
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], found[1])
