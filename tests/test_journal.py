"""Reading a journal. Oracle: the lines as they were written."""

import pytest

from atp.journal import JOURNAL, read_lines

WHOLE = '{"step": 0, "log": {}}\n'


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", '{"step": "1"}', '{"step": true}', '{"step": NaN}', '{"step": 1e999}', "\x00\xff", '{"step": 1'],
)
def test_lines_that_are_none_are_counted_and_left_out(tmp_path, line):
    (tmp_path / JOURNAL).write_text(f'{WHOLE}{line}\n\n{{"step": 2.0, "log": {{}}}}\n', encoding="utf-8")
    assert read_lines(tmp_path / JOURNAL) == ([{"step": 0, "log": {}}, {"step": 2, "log": {}}], 1)


@pytest.mark.parametrize("cut", ["", '{"step": 1', "[" * 100_000])
def test_a_cut_last_line_does_not_count(tmp_path, cut):
    (tmp_path / JOURNAL).write_text(WHOLE + cut, encoding="utf-8")
    assert read_lines(tmp_path / JOURNAL) == ([{"step": 0, "log": {}}], 0)
    (tmp_path / JOURNAL).write_text(WHOLE.rstrip(), encoding="utf-8")
    assert read_lines(tmp_path / JOURNAL) == ([{"step": 0, "log": {}}], 0)


def test_there_may_be_no_such_file(tmp_path):
    with pytest.raises(OSError, match=JOURNAL):
        read_lines(tmp_path / JOURNAL)
