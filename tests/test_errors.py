"""What a user is told of an error. Oracle: by hand."""

import pytest

from atp.errors import in_one_line


@pytest.mark.parametrize(
    ("text", "at_most", "wanted"),
    [
        ("a\n b", 20, "a b"),
        ("", 20, "ValueError"),
        ("see https://somewhere.org/of", 28, "see https://somewhere.org/of"),
        ("see https://somewhere.org/of", 27, "see ..."),
        ("x" * 30, 20, "x" * 16 + " ..."),
    ],
)
def test_one_line_ends_with_a_whole_word(text, at_most, wanted):
    assert in_one_line(ValueError(text), at_most) == wanted
