"""A run put together from parts. Oracle: steps whose seconds are given, summed by hand."""

import pytest
from tqdm.auto import tqdm

from atp.bench import timing, whole_run_results
from atp.config import ATPConfig
from atp.errors import ConfigError
from atp.evaluation import flops_per_token
from tests import tiny

STEPS, FREEZE_AT = 40, 0.5
KINDS = {"before pruning": (0, 10), "learning": (10, 20), "final": (20, 40)}


@pytest.fixture
def seconds(monkeypatch):
    """By step of the ATP run, or None for plain LoRA, what a call takes; what has been called, in order."""
    takes, called = {}, []

    def measured(step):
        index = None if step.learner is None else step.index
        step()
        called.append((index, step))
        return takes.get(index, 1.0), 100.0 + len(called)

    monkeypatch.setattr("atp.bench.whole_run.measured", measured)
    return takes, called


def run(**settings):
    base = tiny.model()
    config = ATPConfig(sparsity=0.5, round_to=1, freeze_at=FREEZE_AT, refit_rows=64, **settings)
    return base, whole_run_results(base, config, lora_rank=2, rows=2, length=8, steps=STEPS, calls=3)


def test_the_whole_is_first_steps_and_later_ones_as_often_as_they_come(seconds):
    takes, called = seconds
    takes |= {None: 2.0, 0: 3.0, 1: 1.0, 2: 1.0, 3: 1.0, 10: 50.0, 11: 2.5, 12: 2.5, 13: 2.5}
    takes |= {20: 100.0, 21: 0.5, 22: 0.7, 23: 0.5}
    _, (plain, pruned, *firsts) = run()
    assert plain.median_ms == STEPS * 2.0 * 1e3
    whole = (3.0 + 9 * 1.0) + (50.0 + 9 * 2.5) + (100.0 + 19 * 0.5)
    assert pruned.median_ms == pytest.approx(whole * 1e3)
    assert pruned.p80_ms > pruned.median_ms
    assert pruned.ratio == pytest.approx(whole / (STEPS * 2.0))
    assert [f.case for f in firsts] == [f"first step, {kind}" for kind in KINDS]
    assert [f.median_ms for f in firsts] == [2000.0, 47_500.0, 99_500.0]
    assert (plain.peak_mib, pruned.peak_mib) == (101.0, 100.0 + len(called))  # the first call of all, and the last


def test_steps_are_taken_where_they_come_in_the_run(seconds):
    _, called = seconds
    base, results = run()
    pruned = [index for index, _ in called if index is not None]
    assert pruned == [begins + i for begins, _ in KINDS.values() for i in range(4)]
    learner = next(step.learner for index, step in called if index is not None)
    assert learner.frozen_at == 20
    assert learner.schedule.start_step == 10
    assert learner.overlap() is not None  # the criterion has scored
    assert learner._compensation.state()  # and what stays has been refitted
    assert learner.attachment.is_compact
    gone = learner.space.prunable_parameters * 0.5
    left = 1.0 - 2 * gone / flops_per_token(base)
    assert results[1].limit == pytest.approx(1.0 - (1.0 - left) / 2)


def test_a_run_with_fewer_steps_of_a_kind_than_are_timed_is_refused():
    config = ATPConfig(sparsity=0.5, round_to=1, freeze_at=FREEZE_AT)
    with pytest.raises(ConfigError, match="of 40 steps has 10 'before pruning', and 11 of each kind are timed: raise"):
        whole_run_results(tiny.model(), config, lora_rank=2, rows=2, length=8, steps=STEPS, calls=10)


def test_progress_counts_every_step_once(seconds, monkeypatch):
    _, called = seconds
    bars = []
    monkeypatch.setattr(timing, "tqdm", lambda **settings: bars.append(tqdm(**settings)) or bars[-1])
    run()
    [bar] = bars
    assert bar.n == bar.total == len(called) - 1  # plain LoRA's first, for its memory, comes before


def test_a_kind_without_steps_is_left_out(seconds):
    _, (_, _, *firsts) = run(start_at=0.0)
    assert [f.case for f in firsts] == ["first step, learning", "first step, final"]
