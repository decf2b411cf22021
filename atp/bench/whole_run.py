"""A whole run beside plain LoRA of as many steps, put together from parts, each timed where it comes in the run.

Steps are of three kinds: before anything is pruned, while a decision is learned, and under the final decision. The
first of the second kind scores what may go, the first of the third refits what stays; later ones of a kind are alike,
so that a few stand for all:

    seconds of a run = sum over kinds:  seconds of its first step + (its steps - 1) * median seconds of a later one

Not covered: what `train_step` does not cover but for scores and refit; reading the model and writing the smaller one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from atp.bench.copies import attached
from atp.bench.timing import Result, measured, percentile, timing_bar
from atp.bench.train_step import OptimizerStep, adapted, flops_left
from atp.config import ATPConfig
from atp.errors import ConfigError
from atp.training.run import PruningRun
from atp.training.schedule import Schedule

_DATASET_ROWS = 1024
"""Random rows to draw those for calibration and refit from: enough for the defaults of both."""


@dataclass
class _Steps:
    """Seconds of steps that are alike, and the highest memory of any, in MiB, if it is known."""

    count: int = 0
    first: float = 0.0
    later: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    def run(self, step: OptimizerStep) -> float:
        """Take one."""
        took, peak = measured(step)
        self.peak_mib = max((p for p in (peak, self.peak_mib) if p is not None), default=None)
        return took

    def total(self, share: float) -> float:
        """Of all of them, by a percentile of the later ones."""
        return self.first + (self.count - 1) * percentile(self.later, share)


def whole_run_results(
    base: PreTrainedModel, config: ATPConfig, lora_rank: int, rows: int, length: int, steps: int, calls: int
) -> list[Result]:
    """`steps` optimizer steps of `rows` times `length` tokens, of plain LoRA and of ATP with the settings of `config`.

    Args:
        base: its weights are rewritten by the refit.
        calls: later steps that are timed of each kind, each after one of plain LoRA.

    Returns:
        Plain LoRA, ATP, and by how much the first step of a kind takes longer than a later one.

    Raises:
        ConfigError: where the run has fewer steps of a kind than are to be timed.
    """
    schedule = Schedule.of(config, steps)
    spans = _spans(schedule, calls)
    autocast = base.dtype == torch.bfloat16
    dataset = _RandomRows(base.config.get_text_config().vocab_size, length)
    loader = DataLoader(dataset, rows, collate_fn=default_data_collator)
    batch = {k: v.to(base.device) for k, v in next(iter(loader)).items()}
    dense = OptimizerStep(adapted(base, lora_rank), batch, autocast)
    plain = _Steps(steps)
    plain.run(dense)  # for its memory, while nothing else is there
    model = adapted(base, lora_rank)
    run = PruningRun(
        config, model, attached(model, config), loader, None, total_steps=steps, batch_size=rows, quiet=True
    )
    pruned = OptimizerStep(model, batch, autocast, run.learner)
    run.learner.start()
    kinds = {}
    with timing_bar(len(spans) * (1 + 2 * calls)) as bar:
        for name, (begins, count) in spans.items():
            pruned.index = begins
            kinds[name] = _timed(_Steps(count), pruned, plain, dense, calls, bar)
    run.end()
    plain.first = percentile(plain.later, 0.5)
    left = flops_left(base, run.learner.space, config.sparsity)
    return _results(plain, kinds, 1.0 - (1.0 - left) * (steps - schedule.freeze_step) / steps)


def _spans(schedule: Schedule, calls: int) -> dict[str, tuple[int, int]]:
    """First step and number of each kind of step that there is."""
    begins = {"before pruning": 0, "learning": schedule.start_step, "final": schedule.freeze_step}
    ends = (schedule.start_step, schedule.freeze_step, schedule.total_steps)
    spans = {name: (at, end - at) for (name, at), end in zip(begins.items(), ends, strict=True) if end > at}
    kind, count = min(((name, count) for name, (_, count) in spans.items()), key=itemgetter(1))
    if count < calls + 1:
        raise ConfigError(
            f"a run of {schedule.total_steps} steps has {count} {kind!r}, and {calls + 1} of each kind are timed: "
            "raise --steps or lower --calls"
        )
    return spans


def _timed(kind: _Steps, pruned: OptimizerStep, plain: _Steps, dense: OptimizerStep, calls: int, bar: tqdm) -> _Steps:
    kind.first = kind.run(pruned)
    bar.update()
    for _ in range(calls):
        plain.later.append(measured(dense)[0])
        bar.update()
        kind.later.append(kind.run(pruned))
        bar.update()
    return kind


def _results(plain: _Steps, kinds: dict[str, _Steps], limit: float) -> list[Result]:
    whole = plain.total(0.5)

    def result(case: str, seconds: Sequence[float], limit: float | None, peak: float | None) -> Result:
        p20, median, p80 = (s * 1e3 for s in seconds)
        return Result(case, len(plain.later), p20, median, p80, seconds[1] / whole, limit, peak)

    shares = (0.2, 0.5, 0.8)
    peak = max((kind.peak_mib for kind in kinds.values() if kind.peak_mib is not None), default=None)
    return [
        result("plain LoRA", [plain.total(share) for share in shares], None, plain.peak_mib),
        result("ATP", [sum(kind.total(share) for kind in kinds.values()) for share in shares], limit, peak),
        *(
            result(f"first step, {name}", [kind.first - percentile(kind.later, 0.5)] * 3, None, kind.peak_mib)
            for name, kind in kinds.items()
        ),
    ]


class _RandomRows(Dataset):
    def __init__(self, vocabulary: int, length: int) -> None:
        self._ids = torch.randint(vocabulary, (_DATASET_ROWS, length)).tolist()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}
