"""Oracle: distances between neighbours."""

import pytest

from atp.subset import evenly_spread


@pytest.mark.parametrize(("total", "wanted"), [(10, 1), (10, 3), (10, 9), (1000, 64)])
def test_distances_differ_by_one_at_most(total, wanted):
    indices = evenly_spread(total, wanted)
    ends = [*indices[1:], total]
    distances = {end - start for start, end in zip(indices, ends, strict=True)}
    assert (len(indices), indices[0]) == (wanted, 0)
    assert max(distances) - min(distances) <= 1


@pytest.mark.parametrize("wanted", [None, 5, 6])
def test_all_where_there_are_no_more(wanted):
    assert evenly_spread(5, wanted) == [0, 1, 2, 3, 4]
