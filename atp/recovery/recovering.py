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
from atp.recovery.diagnostics import Quality, QualitySum, stream_error
from atp.recovery.layerwise import refit_writers
from atp.recovery.outcome import BlockOutcome, Outcome
from atp.recovery.pairs import Half, pair
from atp.recovery.settings import RecoverySettings
from atp.recovery.shelf import Shelf
from atp.recovery.streams import Stream
from atp.recovery.texts import CALIBRATION, HELD_OUT, Texts

PROBED = 32
"""Windows of calibration text on which blocks' errors are taken, of those fitted to; of other texts they are on all."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Probe:
    """One text on its way: ids, the teacher's stream, the student's as it was before recovery, and as it is now."""

    batches: list[Tensor]
    truth: Stream
    before: Stream
    after: Stream


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
        batches = {name: list(ids.split(settings.batch_size)) for name, ids in texts.by_name().items()}
        probed = batches | {CALIBRATION: list(_spread(texts.calibration, PROBED).split(settings.batch_size))}
        every = [ids for each in (*batches.values(), *probed.values()) for ids in each]
        self._pair = pair(teacher, student, list({len(ids): ids for ids in every}.values()), device)
        self._fitted = Stream.opening(self._pair.student, batches[CALIBRATION], work)
        self._truth = Stream.opening(self._pair.teacher, batches[CALIBRATION], work) if settings.propagates else None
        self._probes = {name: self._probe(each) for name, each in probed.items()}
        self._kept: dict[int, bool] = {}
        self._seconds: dict[int, float] = {}

    def run(self, quiet: bool) -> Outcome:
        """All of it."""
        blocks: list[BlockOutcome] = []
        windows = _windows(len(self._pair.blocks), self._settings.crosses)
        for window in tqdm(windows, desc="atp: recovering blocks", unit="block", leave=False, disable=quiet):
            with self._pair.placed(*window.blocks):
                self._window(window)
                blocks += [self._pass(index) for index in range(window.first, window.following)]
        before, after = self._qualities()
        better = after[HELD_OUT].nll < before[HELD_OUT].nll
        kept = better or not self._settings.keep_best
        if not kept:
            for index, block in enumerate(self._pair.student.blocks):
                _load(block, self._shelf.original(index))
        return Outcome(tuple(blocks), before, after, kept)

    def _window(self, window: _Window) -> None:
        """Fit the window's blocks, or take what an interrupted recovery has made of them."""
        modules = {index: self._pair.student.blocks[index] for index in window.blocks}
        for index, module in modules.items():
            if index not in self._kept:
                self._kept[index], self._seconds[index] = False, 0.0
                self._shelf.put_original(index, _state(module))
        if self._truth is not None:
            self._truth.pass_on(self._through(self._pair.teacher, window.last))
        finished = self._shelf.window(window.last)
        if finished is not None:
            states, about = finished
            for index, state in states.items():
                _load(modules[index], state)
            kept, seconds = about["kept"], about["seconds"]
        else:
            start = time.perf_counter()
            kept = self._fit(window, modules)
            seconds = time.perf_counter() - start
            states = {index: _state(module) for index, module in modules.items()}
            self._shelf.put_window(window.last, states, {"kept": kept, "seconds": seconds})
        for index in window.blocks:
            self._kept[index] |= kept
            self._seconds[index] += seconds / len(modules)

    def _fit(self, window: _Window, modules: Mapping[int, nn.Module]) -> bool:
        """Whether what the fit has made of the blocks stays."""
        probe = self._probes[HELD_OUT]
        truth = probe.truth.mapped(self._through(self._pair.teacher, *window.blocks), self._work)
        student = self._through(self._pair.student, *window.blocks)

        @torch.no_grad()
        def error() -> float:
            found = stream_error((student(batch) for batch in probe.after), truth).relative
            return found if math.isfinite(found) else math.inf

        was, states = error(), {index: _state(module) for index, module in modules.items()}
        self._fit_to_calibration(window, error)
        now = error()
        if now < was or (not self._settings.keep_best and math.isfinite(now)):
            return True
        if not math.isfinite(now):
            logger.warning("atp: recovery of block %d diverged and is undone: try a lower learning rate", window.last)
        for index, state in states.items():
            _load(modules[index], state)
        return False

    def _fit_to_calibration(self, window: _Window, error: Callable[[], float]) -> None:
        settings = self._settings
        if settings.method == "lr":
            refit_writers(self._pair, window.last, self._fitted, settings.ridge)
            return
        targets = self._truth
        if targets is None:
            targets = self._fitted.mapped(self._through(self._pair.teacher, *window.blocks), self._work)
        train_blocks(self._pair.student, window.blocks, self._fitted, targets, settings, error, self._device)

    def _pass(self, index: int) -> BlockOutcome:
        """Take all streams past a block that is finished."""
        student, block = self._through(self._pair.student, index), self._pair.student.blocks[index]
        self._fitted.pass_on(student)
        for probe in self._probes.values():
            probe.truth.pass_on(self._through(self._pair.teacher, index))
            probe.after.pass_on(student)
        made = _state(block)
        _load(block, self._shelf.original(index))
        for probe in self._probes.values():
            probe.before.pass_on(student)
        _load(block, made)
        before, after = (
            {name: stream_error(getattr(probe, when), probe.truth) for name, probe in self._probes.items()}
            for when in ("before", "after")
        )
        return BlockOutcome(index, before, after, self._kept[index], self._seconds[index])

    def _through(self, half: Half, *indices: int) -> Callable[[Tensor], Tensor]:
        """A function that takes a batch through blocks, to and from where they compute."""

        def through(hidden: Tensor) -> Tensor:
            hidden = hidden.to(self._device)
            for index in indices:
                hidden = half.run(index, hidden)
            return hidden

        return through

    def _probe(self, batches: list[Tensor]) -> _Probe:
        student = Stream.opening(self._pair.student, batches, self._work)
        truth = Stream.opening(self._pair.teacher, batches, self._work)
        return _Probe(batches, truth, student.copy(self._work), student)

    def _qualities(self) -> tuple[dict[str, Quality], dict[str, Quality]]:
        """Before and after, of every text but calibration; streams are past the last block."""
        models = (self._pair.teacher.lm, self._pair.student.lm)
        try:
            for lm in models:
                lm.to(self._device)
            found = {name: self._quality(probe) for name, probe in self._probes.items() if name != CALIBRATION}
        finally:
            for lm in models:
                lm.to("cpu")
        before, after = ({name: each[index] for name, each in found.items()} for index in (0, 1))
        return before, after

    def _quality(self, probe: _Probe) -> tuple[Quality, Quality]:
        teacher, student = self._pair.teacher, self._pair.student
        before, after = QualitySum(), QualitySum()
        for ids, *streams in zip(probe.batches, probe.truth, probe.before, probe.after, strict=True):
            for row, *states in zip(*(part.to(self._device).split(1) for part in (ids, *streams)), strict=True):
                truth, was, now = (
                    half.logits(row, state) for half, state in zip((teacher, student, student), states, strict=True)
                )
                before.add(row[0], was, truth)
                after.add(row[0], now, truth)
        return before.mean(), after.mean()


def _windows(blocks: int, crossing: bool) -> Sequence[_Window]:
    """{0}, {1}, {2} ..., or, crossing, {0}, {0, 1}, {1, 2} ..., {L-2, L-1}."""
    if not crossing:
        return [_Window(i, i, i + 1) for i in range(blocks)]
    return [_Window(max(i - 1, 0), i, i if i < blocks - 1 else blocks) for i in range(blocks)]


def _spread(ids: Tensor, most: int) -> Tensor:
    """At most so many windows, at equal distances."""
    count = min(len(ids), most)
    return ids[[index * len(ids) // count for index in range(count)]]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name])
