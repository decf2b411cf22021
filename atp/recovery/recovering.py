"""Recovery, block after block: each is fitted to the dense tuned model's, and kept where held-out text is better.

Reconstruction as Shin et al. (EMNLP 2024) tell it: blocks are fitted in their order, each on what those before it, as
fitted, make of the text. Two models lie on the CPU; the one or two blocks at work, and a batch, are where they compute.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from atp.recovery.blockwise import train_blocks
from atp.recovery.diagnostics import Error, Quality, QualitySum, stream_error
from atp.recovery.layerwise import refit_writers
from atp.recovery.outcome import BlockOutcome, Outcome
from atp.recovery.pairs import Half, pair
from atp.recovery.settings import RecoverySettings
from atp.recovery.shelf import Shelf
from atp.recovery.streams import Stream
from atp.recovery.texts import CALIBRATION, HELD_OUT, Texts
from atp.subset import evenly_spread

PROBED = 32
"""Windows of calibration text on which blocks' errors are taken, of those fitted to; of other texts they are on all."""

CHUNK = 256
"""Tokens whose distributions are held at a time."""

LOOK = 2048
"""Tokens that go past a block at a time where nothing is trained; on two cores, four times as many took longer."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Way:
    """One text on its way past the blocks.

    `ids`: of each batch. `before`: the student's stream as it was before recovery, of the batches on which errors are
    taken; `after`: as it is now, of all. `truths`: the teacher's, after each block that is still asked for.
    """

    ids: Mapping[int, Tensor]
    before: Stream
    after: Stream
    truths: dict[int, Stream]

    def errors(self, index: int) -> tuple[Error, Error]:
        """Before recovery and now, of streams after block `index`."""
        batches = self.before.indices
        truth = self.truths[index]
        before, after = (stream_error(stream.of(batches), truth.of(batches)) for stream in (self.before, self.after))
        return before, after


@dataclass(frozen=True)
class _Window:
    """Blocks `first` to `last`, fitted together; the next window begins with block `following`."""

    first: int
    last: int
    following: int

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


@torch.no_grad()
def recover(
    teacher: nn.Module,
    student: PreTrainedModel,
    texts: Texts,
    settings: RecoverySettings,
    work: Path,
    device: str = "cpu",
    quiet: bool = False,
) -> Outcome:
    """Fit the blocks of `student` in place.

    Args:
        teacher: the dense tuned model, of as many blocks and the same hidden size, on the CPU.
        student: the pruned model, on the CPU.
        work: an existing folder for what an interrupted recovery goes on from, and for streams that are large. What
            another call with the same arguments has left there is taken up.
        device: where blocks compute.
        quiet: no progress bars.

    Raises:
        UnsupportedModelError: where the two cannot be compared, or the method does not fit a layer.
        CheckpointError: where what lies in `work` is damaged, or the disk is full.
    """
    return _Recovery(teacher, student, texts, settings, work, device).run(quiet)


class _Recovery:
    def __init__(
        self,
        teacher: nn.Module,
        student: PreTrainedModel,
        texts: Texts,
        settings: RecoverySettings,
        work: Path,
        device: str,
    ) -> None:
        self._settings, self._work, self._device = settings, work, device
        self._shelf = Shelf(work)
        self._rows = settings.batch_size if settings.trains else max(LOOK // texts.held_out.shape[1], 1)
        by_text = {name: dict(enumerate(ids.split(self._rows))) for name, ids in texts.by_name().items()}
        by_rows = {len(ids): ids for batches in by_text.values() for ids in batches.values()}
        self._pair = pair(teacher, student, list(by_rows.values()), device)
        self._ways = {name: self._way(name, batches) for name, batches in by_text.items()}
        self._kept: dict[int, bool] = {}
        self._seconds: dict[int, float] = {}

    def run(self, quiet: bool) -> Outcome:
        """All of it."""
        blocks: list[BlockOutcome] = []
        windows = _windows(len(self._pair.blocks), self._settings.crosses)
        for window in tqdm(windows, desc="atp: recovering blocks", unit="block", leave=False, disable=quiet):
            with self._pair.placed(*window.blocks):
                passed = self._window(window)
                blocks += [self._pass(index, passed) for index in range(window.first, window.following)]
        before, after = self._qualities()
        better = after[HELD_OUT].nll < before[HELD_OUT].nll
        kept = better or not self._settings.keep_best
        if not kept:
            for index, block in enumerate(self._pair.student.blocks):
                _load(block, self._shelf.original(index))
        return Outcome(tuple(blocks), before, after, kept)

    def _window(self, window: _Window) -> Stream | None:
        """Fit the window's blocks, or take what an interrupted recovery has made of them.

        Returns:
            The student's stream of calibration text after the window, where the fit has come by it.
        """
        passed = None
        modules = {index: self._pair.student.blocks[index] for index in window.blocks}
        for index, module in modules.items():
            if index not in self._kept:
                self._kept[index], self._seconds[index] = False, 0.0
                self._shelf.put_original(index, _state(module))
        for way in self._ways.values():
            way.truths[window.last] = way.truths[window.last - 1].mapped(
                self._through(self._pair.teacher, window.last), self._work
            )
        finished = self._shelf.window(window.last)
        if finished is not None:
            states, about = finished
            for index, state in states.items():
                _load(modules[index], state)
            kept, seconds = about["kept"], about["seconds"]
        else:
            start = time.perf_counter()
            kept, passed = self._fit(window, modules)
            seconds = time.perf_counter() - start
            states = {index: _state(module) for index, module in modules.items()}
            self._shelf.put_window(window.last, states, {"kept": kept, "seconds": seconds})
        for index in window.blocks:
            self._kept[index] |= kept
            self._seconds[index] += seconds / len(modules)
        return passed

    def _fit(self, window: _Window, modules: Mapping[int, nn.Module]) -> tuple[bool, Stream | None]:
        """Whether what the fit has made of the blocks stays; and, where it does, what `_window` returns."""
        way = self._ways[HELD_OUT]
        student = self._through(self._pair.student, *window.blocks)

        @torch.no_grad()
        def error() -> float:
            found = stream_error((student(batch) for batch in way.after), way.truths[window.last])
            return found.relative if found.finite else math.inf

        was, states = error(), {index: _state(module) for index, module in modules.items()}
        passed = self._fit_to_calibration(window, was, error)
        now = error()
        if now < was or (not self._settings.keep_best and math.isfinite(now)):
            return True, passed
        if not math.isfinite(now):
            logger.warning("atp: recovery of block %d diverged and is undone: try a lower learning rate", window.last)
        for index, state in states.items():
            _load(modules[index], state)
        return False, None

    def _fit_to_calibration(self, window: _Window, was: float, error: Callable[[], float]) -> Stream | None:
        """What `_window` returns."""
        settings, way = self._settings, self._ways[CALIBRATION]
        if settings.refits:
            passed = self._refit(window)
            if not settings.trains:
                return passed
            was = error()
        if settings.propagates:
            targets = way.truths[window.last]
        else:
            targets = way.after.mapped(self._through(self._pair.teacher, *window.blocks), self._work)
        train_blocks(self._pair.student, window.blocks, way.after, targets, settings, was, error, self._device)
        return None

    def _refit(self, window: _Window) -> Stream:
        """Refit the window's last block, the others being fitted already; what `_window` returns."""
        stream, before = self._ways[CALIBRATION].after, window.blocks[:-1]
        if before:
            stream = stream.mapped(self._through(self._pair.student, *before), self._work)
        return refit_writers(self._pair, window.last, stream, self._settings.ridge, self._work)

    def _pass(self, index: int, passed: Stream | None) -> BlockOutcome:
        """Take all streams past a block that is finished; `passed`: the student's of calibration text, if it has."""
        student, block = self._through(self._pair.student, index), self._pair.student.blocks[index]
        for name, way in self._ways.items():
            if passed is not None and name == CALIBRATION:
                way.after = passed
            else:
                way.after.pass_on(student)
            del way.truths[index - 1]
        made = _state(block)
        _load(block, self._shelf.original(index))
        for way in self._ways.values():
            way.before.pass_on(student)
        _load(block, made)
        found = {name: way.errors(index) for name, way in self._ways.items()}
        before, after = ({name: errors[when] for name, errors in found.items()} for when in (0, 1))
        return BlockOutcome(index, before, after, self._kept[index], self._seconds[index])

    def _through(self, half: Half, *indices: int) -> Callable[[Tensor], Tensor]:
        """A function that takes a batch through blocks, to and from where they compute."""

        def through(hidden: Tensor) -> Tensor:
            dtype, hidden = hidden.dtype, hidden.to(self._device)
            for index in indices:
                hidden = half.run(index, hidden.to(_dtype_of(half.blocks[index])))
            return hidden.to(dtype)

        return through

    def _way(self, name: str, batches: Mapping[int, Tensor]) -> _Way:
        """Before the first block. Of calibration text the teacher's stream is followed as far as it is asked for."""
        judged = batches
        if name == CALIBRATION:
            few = max(PROBED // self._rows, 1)
            judged = {index: batches[index] for index in evenly_spread(len(batches), few)}
        taught = batches if self._settings.propagates else judged
        before, after = (Stream.opening(self._pair.student, each, self._work) for each in (judged, batches))
        return _Way(batches, before, after, {-1: Stream.opening(self._pair.teacher, taught, self._work)})

    def _qualities(self) -> tuple[dict[str, Quality], dict[str, Quality]]:
        """Before and after, of every text but calibration; streams are past the last block."""
        models = (self._pair.teacher.lm, self._pair.student.lm)
        try:
            for lm in models:
                lm.to(self._device)
            found = {name: self._quality(way) for name, way in self._ways.items() if name != CALIBRATION}
        finally:
            for lm in models:
                lm.to("cpu")
        before, after = ({name: each[index] for name, each in found.items()} for index in (0, 1))
        return before, after

    def _quality(self, way: _Way) -> tuple[Quality, Quality]:
        teacher, student = self._pair.teacher, self._pair.student
        before, after = QualitySum(), QualitySum()
        truth_of = way.truths[len(self._pair.blocks) - 1]
        for ids, *streams in zip(way.ids.values(), truth_of, way.before, way.after, strict=True):
            for row, *states in zip(*(part.to(self._device).split(1) for part in (ids, *streams)), strict=True):
                for start in range(0, row.shape[1] - 1, CHUNK):
                    some = slice(start, min(start + CHUNK, row.shape[1] - 1))
                    truth, was, now = (
                        half.logits(row[:, some], state[:, some])
                        for half, state in zip((teacher, student, student), states, strict=True)
                    )
                    labels = row[0, some.start + 1 : some.stop + 1]
                    before.add(labels, was, truth)
                    after.add(labels, now, truth)
        return before.mean(), after.mean()


def _windows(blocks: int, crossing: bool) -> Sequence[_Window]:
    """{0}, {1}, {2} ..., or, crossing, {0}, {0, 1}, {1, 2} ..., {L-2, L-1}."""
    if not crossing:
        return [_Window(i, i, i + 1) for i in range(blocks)]
    return [_Window(max(i - 1, 0), i, i if i < blocks - 1 else blocks) for i in range(blocks)]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name])


def _dtype_of(block: nn.Module) -> torch.dtype:
    """What a block computes in: float32 while it is trained."""
    return next(parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())
