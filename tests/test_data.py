"""Rows and windows. Oracle: the tokenizer itself, applied to the joined text."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from atp.commands.datasets import load_data
from atp.data import (
    IGNORED,
    Row,
    TaskRow,
    check_disjoint,
    collator,
    fingerprint,
    make_windows,
    read_rows,
    read_task,
)
from atp.errors import DataError
from atp.evaluation import continuation
from atp.recipe import DataSettings
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def rows(tmp_path):
    return read_rows(str(tiny.jsonl(tmp_path / "rows.jsonl", range(12))))


def test_reads_pairs_text_templates_and_several_files(tmp_path):
    pairs = tiny.jsonl(tmp_path / "pairs.jsonl", range(2))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "statute", "id": 1}\n\n')
    columns = tmp_path / "columns.json"
    columns.write_text('{"q": "why", "a": {"long": ["because"]}}\n')
    assert read_rows([str(pairs), str(text)]) == [*(Row(**tiny.row(i)) for i in range(2)), Row("", "statute")]
    assert read_rows(str(columns), prompt="Q: {q}", completion=" {a[long][0]}") == [Row("Q: why", " because")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("[1, 2]\n", "line 1: must be a JSON object, found list"),
        (
            '{"prompt": "a", "answer": "b"}\n',
            "needs columns `prompt` and `completion`, or `text`; found prompt, answer",
        ),
        ('{"text": 3}\n', "must be strings"),
        ('{"text": "abc \\ud83d"}\n', r"line 1: 'abc \\ud83d' ends in half of a character"),
        (
            '{"prompt": "a", "completion": " b"}\n{"prompt": "\\ude00", "completion": " b"}\n',
            "line 2: .* ends in half of",
        ),
        (f'{{"text": {"[" * 100_000}\n', "line 1: cannot be read: nested too deeply"),
        (f'{{"text": "a", "id": {"1" * 5_000}}}\n', "line 1: cannot be read: .* a number of thousands of digits"),
    ],
)
def test_bad_files_are_one_line_that_says_where(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(str(path))
    assert "bad.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_have_choices_or_none(tmp_path):
    path = tmp_path / "task.jsonl"
    records = [{"prompt": "a", "completion": " c", "choices": [" b", " c"], "label": 1, "id": "7"}]
    path.write_text("\n".join(json.dumps(r) for r in records))
    assert read_task(str(path)) == [TaskRow("a", " c", (" b", " c"), 1)]
    assert read_task(str(tiny.jsonl(path, range(2)))) == [TaskRow(**tiny.row(0)), TaskRow(**tiny.row(1))]
    path.write_text('{"text": "statute"}\n{"prompt": "", "completion": "case law"}\n')
    assert read_task(str(path)) == [TaskRow("", "statute"), TaskRow("", "case law")]


def test_tasks_are_of_a_kind():
    rows = [TaskRow("a", " c", (" b", " c"), 1), TaskRow("a", " c"), TaskRow("", "c")]
    assert [row.kind for row in rows] == ["choice", "generation", "text"]


def test_fingerprints_tell_rows_and_their_order_apart():
    rows = [TaskRow("a", " c", (" b", " c"), 1), TaskRow("b", " b", (" b", " c"), 0)]
    again = [TaskRow("a", " c", (" b", " c"), 1), TaskRow("b", " b", (" b", " c"), 0)]
    assert fingerprint(rows) == fingerprint(again)
    others = [rows[::-1], rows[:1], [rows[0], TaskRow("b", " b", (" b", " d"), 0)], [Row("a", " c"), Row("b", " b")]]
    assert len({fingerprint(each) for each in [rows, *others]}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": [" c"]}, "line 1: `choices` must be a list of two strings or more"),
        ({"choices": None}, "line 1: `choices` must be a list of two strings or more, found None"),
        ({"choices": [" \ud83d", " c"]}, r"line 1: ' \\ud83d' ends in half of a character"),
        ({"label": 2}, "line 1: `label` must be a number from 0 to 1, found 2"),
        ({"label": None}, "line 1: `label` must be a number from 0 to 1, found None"),
        ({"label": 0}, r"line 1: choices\[0\] is ' b', the completion ' c'"),
        ({"prompt": ""}, "line 1: a task needs a `prompt` and a `completion`"),
        ({"prompt": "", "choices": None, "label": None, "completion": " "}, "or `text`, and what is there is empty"),
    ],
)
def test_bad_tasks_are_one_line_that_says_where(tmp_path, changes, message):
    path = tmp_path / "task.jsonl"
    good = {"prompt": "a", "completion": " c", "choices": [" b", " c"], "label": 1}
    path.write_text(json.dumps(good | changes))
    with pytest.raises(DataError, match=message):
        read_task(str(path))


def test_a_task_with_some_choices_or_no_rows_is_an_error(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=r"task\.jsonl: holds no rows"):
        read_task(str(path))
    rows = [{"prompt": "a", "completion": " c", "choices": [" b", " c"], "label": 1}, tiny.row(0)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    with pytest.raises(DataError, match="some rows have `choices` and some have none"):
        read_task(str(path))
    path.write_text("\n".join(json.dumps(r) for r in [{"text": "a"}, tiny.row(0)]))
    with pytest.raises(DataError, match="some rows have a `prompt` and some have none"):
        read_task(str(path))


def test_missing_files_wrong_suffixes_and_templates_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=r"must end in \.jsonl"):
        read_rows(str(tmp_path / "rows.txt"))
    path = tiny.jsonl(tmp_path / "rows.jsonl", range(1))
    with pytest.raises(DataError, match="template ' {answer}' does not fit"):
        read_rows(str(path), prompt="", completion=" {answer}")


@pytest.mark.parametrize(
    ("template", "record"),
    [
        (" {answer}", {"answer": None}),
        (" {answer!r:>9}", {"answer": None}),
        (" {answer[long][0]}", {"answer": {"long": [None]}}),
    ],
)
def test_a_null_is_no_word_for_a_template(tmp_path, template, record):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in ({"answer": {"long": ["b"]}}, record)))
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: `answer.*` is null, and template ' {answer.*}' takes it"
    ):
        read_rows(str(path), prompt="", completion=template)


def test_a_hub_set_that_cannot_be_read_is_a_data_error(monkeypatch):
    def refuse(name, config, split):
        raise ConnectionError(f"no network for {name} {config} {split}")

    monkeypatch.setattr("atp.data.load_dataset", refuse)
    with pytest.raises(DataError, match="no network for org/set part test"):
        read_rows("org/set:part", "test")


def test_a_hub_set_is_read_by_name_config_and_split(monkeypatch):
    monkeypatch.setattr("atp.data.load_dataset", lambda name, config, split: [{"text": f"{name} {config} {split}"}])
    assert read_rows("org/set:part", "test") == [Row("", "org/set part test")]
    assert read_rows("org/set") == [Row("", "org/set None train")]


def test_shared_rows_are_refused_whatever_their_case_and_spacing():
    check_disjoint([Row("a", " b")], [Row("a", " c")], ("training", "validation"))
    with pytest.raises(DataError, match=r"1 row\(s\) are in both the training and the validation set"):
        check_disjoint([Row("A  question", " Yes")], [Row("", "a question yes")], ("training", "validation"))


def test_rows_without_text_are_shared_by_all():
    blank = [Row("", ""), Row(" ", "\n")]
    check_disjoint([Row("a", " b"), *blank], [Row("a", " c"), *blank], ("training", "validation"))


@pytest.mark.parametrize("packing", [True, False])
def test_windows_have_nothing_of_rows_without_text(rows, packing):
    tokenizer = tiny.tokenizer(bos=True)
    with_blank = [Row("", ""), *rows[:5], Row(" ", "\n"), *rows[5:]]
    found, expected = (make_windows(each, tokenizer, 16, packing, progress=False)[:] for each in (with_blank, rows))
    assert found == expected


def test_packed_windows_are_the_token_stream(rows, tokenizer):
    windows = make_windows(rows, tokenizer, max_length=16, progress=False)
    stream = [i for r in rows for i in (*tokenizer(r.prompt + r.completion)["input_ids"], tokenizer.eos_token_id)]
    assert [i for w in windows["input_ids"] for i in w] == stream[: len(windows) * 16]
    assert windows["labels"] == windows["input_ids"]
    assert len(stream) - len(windows) * 16 < 16


@pytest.mark.parametrize("length", [7, 16])
def test_packed_windows_begin_with_bos_where_texts_do(rows, length):
    tokenizer = tiny.tokenizer()
    bos = tokenizer.bos_token_id
    begin = TemplateProcessing(f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)])
    tokenizer.backend_tokenizer.post_processor = begin
    windows = make_windows(rows, tokenizer, length, progress=False)
    assert all(w["input_ids"][0] == bos and len(w["input_ids"]) == length for w in windows)
    assert not any(label == bos for w in windows for label in w["labels"]), "nobody predicts a BOS"
    plain = make_windows(rows, tiny.tokenizer(), 16, progress=False)
    learned = [label for w in windows for label in w["labels"] if label != IGNORED]
    stream = [i for w in plain["input_ids"] for i in w]
    assert learned[: len(stream)] == stream[: len(learned)], "no other token is lost or doubled"


@pytest.mark.parametrize("packing", [True, False])
def test_completion_only_labels_spell_the_completions(rows, tokenizer, packing):
    windows = make_windows(rows, tokenizer, 16 if packing else 200, packing, completion_only=True, progress=False)
    learned = [i for w in windows["labels"] for i in w if i != IGNORED]
    whole = "".join(f"{r.completion}</s>" for r in rows)
    assert whole.startswith(tokenizer.decode(learned))
    assert packing or tokenizer.decode(learned) == whole


def test_a_long_row_loses_the_start_of_its_prompt_first():
    tokenizer = tiny.tokenizer(bos=True)
    row = Row(**tiny.row(3))
    answer = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    for length in (len(answer) + 4, len(answer) + 1):
        (window,) = make_windows([row], tokenizer, length, packing=False, completion_only=True, progress=False)
        assert len(window["input_ids"]) == length
        assert window["input_ids"][0] == tokenizer.bos_token_id
        assert [i for i in window["labels"] if i != IGNORED] == answer


def test_too_little_text_is_an_error(rows, tokenizer):
    with pytest.raises(DataError, match="do not fill one window of 4096 tokens"):
        make_windows(rows, tokenizer, 4096, progress=False)


def test_collator_pads_labels_with_ignored(rows, tokenizer):
    windows = make_windows(rows, tokenizer, 200, packing=False, progress=False)
    batch = collator(tokenizer)([windows[i] for i in range(4)])
    lengths = [len(windows[i]["input_ids"]) for i in range(4)]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == lengths


def test_json_escapes_survive(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Naïve?\n", "completion": " “yes”"}))
    assert read_rows(str(path)) == [Row("Naïve?\n", " “yes”")]


def test_a_mark_at_the_start_is_no_text_and_other_encodings_are_said_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "caf\u00e9"}\n', encoding="utf-8-sig")  # as Windows writes it
    assert read_rows(str(path)) == [Row("", "caf\u00e9")]
    path.write_text('{"text": "caf\u00e9"}\n', encoding="latin-1")
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: it is not UTF-8: save it as UTF-8"):
        read_rows(str(path))


def loaded(folder, validation, **changes):
    """The data of a run, with these rows to measure on."""
    path = folder / "validation.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in validation))
    files = {"train": str(tiny.jsonl(folder / "train.jsonl", range(20))), "validation": str(path)}
    settings = files | {"calibration": files["train"], "max_length": 16} | changes
    return load_data(DataSettings(**settings), tiny.tokenizer(), progress=False)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_samples_are_of_rows_with_text(tmp_path, blank):
    texts = [blank, "a b", blank, blank, "c d", "e f", blank]
    samples = loaded(tmp_path, [{"text": text} for text in texts], packing=False).samples
    assert [row.prompt for row in samples] == ["a b", "c d", "e f"]
    (sample, *_) = loaded(tmp_path, [{"prompt": blank, "completion": "a b"}], packing=False).samples
    assert sample == Row("a b", "")


def test_a_prompt_without_tokens_is_continued_by_nothing(tokenizer):
    assert continuation(tiny.model(), tokenizer, "") == ""


@pytest.mark.parametrize(
    "changes", [{"validation_windows": 3}, {"max_length": 8}, {"packing": False}, {"completion_only": True}], ids=str
)
def test_other_windows_to_measure_have_another_fingerprint(tmp_path, changes):
    rows = [tiny.row(i) for i in range(20, 30)]
    one, again, other = (loaded(tmp_path, rows, **each).fingerprints for each in ({}, {}, changes))
    assert one == again
    assert one["validation_windows"] != other["validation_windows"]
    train = fingerprint(Row(**tiny.row(i)) for i in range(20))
    for each in (one, other):
        assert {name: each[name] for name in ("train", "validation", "calibration")} == {
            **dict.fromkeys(("train", "calibration"), train),
            "validation": fingerprint(Row(**row) for row in rows),
        }


def test_all_windows_have_one_fingerprint_however_they_are_asked_for(tmp_path):
    rows = [tiny.row(i) for i in range(20, 30)]
    one, other = (loaded(tmp_path, rows, validation_windows=each).fingerprints for each in (None, 1_000))
    assert one == other
