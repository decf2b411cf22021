"""The shared data sets, where they lie beside the checkout: every row reads, and no split shares a row with another."""

from pathlib import Path

import pytest

from atp.data import check_disjoint, read_rows

DATA = Path(__file__).parents[2] / "shared" / "data"
NAMES = ("billsum", "casehold", "hqs", "legal_text", "overruling", "pubmedqa")


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not beside this checkout")
@pytest.mark.parametrize("name", NAMES)
def test_splits_read_and_are_disjoint(name: str) -> None:
    splits = {split: read_rows(str(DATA / name / f"{split}.jsonl")) for split in ("train", "validation", "test")}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        check_disjoint(splits[one], splits[other], (one, other))
