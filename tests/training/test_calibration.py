"""Calibration rows: what is held out, what is refused."""

from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from atp.errors import CalibrationError
from atp.training.calibration import Calibration, hold_out, row_hash, shared_row
from atp.training.start import for_refit, for_trials
from tests import runs


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_holding_out_keeps_the_length_and_every_other_row() -> None:
    loader = DataLoader(range(50), batch_size=5, sampler=RandomSampler(range(50)))
    held = hold_out(loader, rows=4, batch_size=4, seed=3)
    seen = torch.cat(list(loader)).tolist()
    assert len(seen) == 50
    assert set(seen) == set(range(50)) - set(held)
    assert hold_out(loader, rows=4, batch_size=4, seed=3) == held, "twice is once"
    assert len(torch.cat(list(loader))) == 50


def test_no_process_of_several_gets_a_held_out_row() -> None:
    """Oracle: accelerate's own loaders of two processes."""
    seen, held = [], set()
    for process in range(2):
        loader = DataLoader(range(50), batch_size=5, sampler=RandomSampler(range(50), generator=torch.Generator()))
        own = prepare_data_loader(
            loader, num_processes=2, process_index=process, put_on_device=False, rng_types=[], use_seedable_sampler=True
        )
        held |= set(hold_out(own, rows=4, batch_size=4, seed=3))
        seen += torch.cat(list(own)).tolist()
    assert len(held) == 4
    assert set(seen) == set(range(50)) - held


def test_at_most_a_tenth_is_held_out() -> None:
    assert len(hold_out(DataLoader(range(100), batch_size=5), rows=64, batch_size=4, seed=0)) == 10


def test_streams_and_tiny_sets_are_refused() -> None:
    with pytest.raises(CalibrationError, match="streaming"):
        hold_out(DataLoader(_Stream()), 4, 4, 0)
    with pytest.raises(CalibrationError, match="too few"):
        hold_out(DataLoader(range(10)), 4, 4, 0)
    with pytest.raises(CalibrationError, match="calibration_rows=2 is less than calibration_batch_size=4"):
        hold_out(DataLoader(range(100)), 2, 4, 0)


def test_batches_wrap_around_and_need_labels() -> None:
    rows = list(runs.dataset(6))

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        return {k: torch.tensor([row[k] for row in batch]) for k in ("input_ids", "labels")}

    calibration = Calibration(rows, collate, 4)
    assert calibration.batch(1)["input_ids"][2].tolist() == rows[0]["input_ids"]
    with pytest.raises(CalibrationError, match="no labels"):
        Calibration(rows, lambda batch: {"input_ids": torch.tensor([row["input_ids"] for row in batch])}, 4)


def test_the_final_refit_sees_training_rows_too_and_no_row_twice() -> None:
    rows = runs.dataset(40)
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda batch: {"labels": torch.tensor([len(batch)])} | batch[0])
    calibration = Calibration([rows[i] for i in range(8)], loader.collate_fn, 4)
    more = for_refit(calibration, 20, loader, seed=0)
    assert len(more) == 5
    assert len(more.hashes()) == 20
    assert calibration.hashes() < more.hashes()
    assert for_refit(calibration, 20, loader, seed=0).hashes() == more.hashes(), "the same for the same seed"
    assert for_refit(calibration, 100, loader, seed=0).hashes() == {row_hash(row) for row in rows}
    assert for_refit(calibration, 4, loader, seed=0).hashes() == calibration.hashes()


def test_trials_are_judged_by_training_rows_that_are_no_calibration_rows() -> None:
    rows = runs.dataset(40)
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda batch: {"labels": torch.tensor([len(batch)])} | batch[0])
    calibration = Calibration([rows[i] for i in range(8)], loader.collate_fn, 4)
    judges = {row_hash(row) for row in for_trials(calibration, 20, loader, seed=0)}
    assert len(judges) == 20
    assert judges < {row_hash(row) for row in rows} - calibration.hashes()
    assert len(for_trials(calibration, 100, loader, seed=0)) == 32
    assert for_trials(calibration, 20, DataLoader(_Stream(), collate_fn=list), seed=0) == []


def test_first_tokens_are_those_of_the_rows_one_by_one_without_padding() -> None:
    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        mask = torch.ones_like(ids)
        mask[:, 3] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    rows = [{"input_ids": [10 * i + j for j in range(5)]} for i in range(4)]
    calibration = Calibration(rows, collate, 2)
    assert [b["input_ids"].tolist() for b in calibration.first_tokens(11)] == [
        [[0], [1], [2], [4], [10], [11], [12], [14]],
        [[20], [21], [22]],
    ]
    assert calibration.first_tokens(0) == []
    assert sum(len(b["input_ids"]) for b in calibration.first_tokens(100)) == 16, "no more than there are"
    pairs = Calibration(rows, lambda batch: collate(batch) | {"attention_mask": torch.ones(2, 1, 5, 5)}, 2)
    assert sum(len(b["input_ids"]) for b in pairs.first_tokens(100)) == 20, "a mask of pairs says nothing of padding"


def test_rows_are_known_by_their_tokens() -> None:
    row = {"input_ids": [3, 4], "labels": [3, 4]}
    assert row_hash(row) == row_hash({"input_ids": torch.tensor([3, 4]), "extra": 1})
    assert shared_row({row_hash(row)}, [{"input_ids": [4, 3]}]) is None
    assert shared_row({row_hash(row)}, [{"input_ids": [4, 3]}, row]) == 1
    pair = {"prompt": "x", "prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "ref_chosen_logps": -1.5}
    assert row_hash(pair) == row_hash(pair | {"ref_chosen_logps": -1.500001})
    assert row_hash(pair) != row_hash(pair | {"chosen_ids": [6]})


def test_all_rows_are_looked_at_also_those_that_fill_no_batch() -> None:
    rows = [{"input_ids": [i], "labels": [i]} for i in range(5)]
    batches = Calibration(rows, lambda batch: {"labels": torch.tensor([row["labels"] for row in batch])}, 2)
    assert [batch["labels"].flatten().tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert len(batches) == 3
    assert batches.batch(2)["labels"].flatten().tolist() == [4, 0], "the generator's are whole"


def test_rows_that_make_no_batch_are_refused_in_one_line() -> None:
    with pytest.raises(CalibrationError, match="calibration_dataset streams"):
        Calibration(_Stream(), list, 1)
    with pytest.raises(CalibrationError, match="cannot be made into a batch .*prepare them as the training set"):
        Calibration([{"text": "fever"}], lambda rows: {"labels": [row["input_ids"] for row in rows]}, 1)
