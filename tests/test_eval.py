"""`atp eval`: tasks, changes, gates. Oracles: exit status, lines on standard error, figures of the JSON by hand."""

import json
import shutil
import sys

import pytest
import torch

from atp.cli import main
from atp.commands.evaluation.figures import is_share
from atp.commands.evaluation.gates import Gate, check_gates, judge, line, parse_gate
from atp.commands.evaluation.sources import find_tasks
from atp.commands.evaluation.tables import short_names
from atp.errors import ConfigError, DataError
from atp.evaluation import Difference
from tests import tiny

CHOICES = [" fever", " cough of", " rash"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, one with other weights, and one in whose place there is noise."""
    folder = tmp_path_factory.mktemp("models")
    tiny.folder(folder / "base")
    for name, noise in (("near", 0.002), ("far", 0.5)):
        shutil.copytree(folder / "base", folder / name)
        model = tiny.model()
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=noise)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task called `finding`."""
    rows = [
        {"prompt": tiny.row(i)["prompt"], "completion": CHOICES[i % 3], "choices": CHOICES, "label": i % 3}
        for i in range(12)
    ]
    (tmp_path / "finding").mkdir()
    path = tmp_path / "finding" / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(tmp_path, *argv):
    """Exit status and the JSON."""
    out = tmp_path / "eval.json"
    return main(["eval", *map(str, argv), "--json", str(out)]), json.loads(out.read_text())


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["eval", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("ppl > +3%", Gate("ppl > +3%", "ppl", True, 3.0, True, True)),
        ("pubmedqa.acc < -2", Gate("pubmedqa.acc < -2", "pubmedqa.acc", False, -2.0, True, False)),
        (" ppl>30 ", Gate("ppl>30", "ppl", True, 30.0, False, False)),
        ("decode.ms > +.5 %", Gate("decode.ms > +.5 %", "decode.ms", True, 0.5, True, True)),
        (
            "a-b.exact_match,strict<40.5",
            Gate("a-b.exact_match,strict<40.5", "a-b.exact_match,strict", False, 40.5, *(False,) * 2),
        ),
    ],
)
def test_gates_are_read(text, gate):
    assert parse_gate(text) == gate
    assert parse_gate("perplexity > 30").name == "ppl"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppl", "is not understood: write NAME, < or >, and a number"),
        ("ppl > much", "is not understood"),
        ("ppl >= 3", "is not understood"),
        ("> 3", "is not understood"),
        ("ppl > 3%", r"needs a sign: write \+3% or -3%"),
        ("pubmedqa.acc < -2%", "scores change in points: write -2 without %"),
    ],
)
def test_gates_that_say_nothing_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("ppl > 3", {"has_data": False}, "it needs --data FILE"),
        ("prefill.ms > +3%", {"has_speed": False}, "it is not measured with --no-speed"),
        ("qa.f1 < -2", {}, "'qa.f1' is unknown: did you mean 'qa.macro_f1'"),
        ("pplx > 3", {}, "'pplx' is unknown: .*known: parameters, .*ppl, qa.acc, qa.macro_f1"),
        ("qa.acc < -2", {"baseline": None}, "give --baseline MODEL"),
    ],
)
def test_gates_on_what_is_not_measured_are_refused(text, settings, message):
    known = {"has_data": True, "has_speed": True, "tasks": {"qa": ("acc", "macro_f1")}, "baseline": "a"}
    check_gates([parse_gate("qa.acc < -2"), parse_gate("ppl > +3%")], **known)
    with pytest.raises(ConfigError, match=message):
        check_gates([parse_gate(text)], **(known | settings))


PPL = Difference(20.0, 21.0, 1.0, 0.4, 1.6, 0.05, 0.02, 0.08, 0.01, "paired permutation")
ACC = Difference(0.55, 0.52, -0.03, -0.06, 0.0, -0.0545, -0.1, 0.0, 0.06, "McNemar, exact")


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        *(("ppl > +3%", True), ("ppl > +5.1%", False), ("ppl > +0.9", True), ("ppl > +1.1", False)),
        *(("ppl > 20.9", True), ("ppl > 21.1", False), ("ppl < 21.1", True), ("ppl < -1%", False)),
        *(("qa.acc < -2", True), ("qa.acc < -3.1", False), ("qa.acc < 52.1", True), ("qa.acc < 51.9", False)),
        *(("qa.acc > +0", False), ("memory > 99", True), ("memory > 100", False)),
    ],
)
def test_gates_are_judged(text, failed):
    verdict = judge(parse_gate(text), "b", {"ppl": 21.0, "qa.acc": 0.52, "memory": 100.0}, {"ppl": PPL, "qa.acc": ACC})
    assert verdict.failed is failed


def test_a_verdict_speaks_in_the_units_of_its_gate():
    points = judge(parse_gate("qa.acc < -2"), "b", {"qa.acc": 0.52}, {"qa.acc": ACC})
    assert (points.baseline, points.value, points.change) == pytest.approx((55, 52, -3))
    assert line(points) == "failed: qa.acc < -2: b has 52, baseline 55, change -3 (95 % -6 to 0), p 0.06"
    percent = judge(parse_gate("ppl > +3%"), "b", {"ppl": 21.0}, {"ppl": PPL})
    assert (percent.change, percent.low, percent.high) == pytest.approx((5, 2, 8))


def test_a_figure_that_is_no_number_fails_and_one_that_is_missing_is_an_error():
    nan = float("nan")
    broken = Difference(20.0, nan, nan, None, None, nan, None, None, None, None)
    assert judge(parse_gate("ppl > +3%"), "b", {"ppl": nan}, {"ppl": broken}).failed
    assert judge(parse_gate("ppl > 30"), "b", {"ppl": nan}, None).failed
    with pytest.raises(ConfigError, match="memory could not be measured for b"):
        judge(parse_gate("memory > 30"), "b", {}, None)


def test_shares_are_told_from_other_scores():
    shares = ("qa.acc", "qa.letter_acc", "qa.exact_match,strict-match", "sum.rougeL", "terror.f1")
    assert all(is_share(name) for name in shares)
    assert not any(is_share(name) for name in ("ppl", "law.ppl", "law.bits_per_byte", "mt.ter", "mt.bleu", "memory"))


def test_eval_measures_all_and_a_worse_model_fails_its_gates(models, task, tmp_path, capsys):
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(20))
    base, far = models / "base", models / "far"
    argv = (base, far, "--data", rows, "--tasks", task, "--baseline", base)
    gates = ("--fail-if", "ppl > +3%", "--fail-if", "parameters > +1%", "--fail-if", "finding.acc < 0")
    status, found = evaluated(tmp_path, *argv, *gates)
    printed = capsys.readouterr()
    assert status == 1
    (failed,) = (text for text in printed.err.splitlines() if text.startswith("atp: "))
    assert failed.startswith(f"atp: failed: ppl > +3%: {far} has ")
    assert found["failed"] == ["ppl > +3%"]
    first, second = found["models"]
    changes = found["differences"][str(far)]
    assert changes["ppl"]["difference"] == pytest.approx(second["perplexity"] - first["perplexity"])
    assert changes["ppl"]["low"] < changes["ppl"]["difference"] < changes["ppl"]["high"]
    for model, name in ((first, "base"), (second, "far")):
        assert model["bytes"] == sum(file.stat().st_size for file in (models / name).iterdir())
        assert model["prefill"]["p20_ms"] <= model["prefill"]["latency_ms"] <= model["prefill"]["p80_ms"]
        assert sum(part["parameters"] for part in model["parts"].values()) == model["parameters"]
        assert len(model["tasks"]["finding"]["items"]["acc"]) == 12
    accuracy = second["tasks"]["finding"]["value"] - first["tasks"]["finding"]["value"]
    assert changes["finding.acc"]["difference"] == pytest.approx(accuracy)
    for told in ("prefill ms", "worst row", "finding.macro_f1", "changes from base", "FAILED"):
        assert told in printed.out
    assert "it/s" not in printed.out, "progress is for standard error"


def test_the_same_model_again_has_changed_in_nothing(models, task, tmp_path):
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(10))
    argv = ("--data", rows, "--tasks", task, "--task-rows", 5, "--no-speed", "--baseline", models / "base")
    gates = ("--fail-if", "ppl > +0", "--fail-if", "finding.acc < -0", "--fail-if", "bytes > +1%")
    shutil.copytree(models / "base", tmp_path / "copy")
    status, found = evaluated(tmp_path, tmp_path / "copy", *argv, *gates)
    assert status == 0
    assert [model["model"] for model in found["models"]] == [str(models / "base"), str(tmp_path / "copy")]
    (changes,) = found["differences"].values()
    for name in ("ppl", "finding.acc", "finding.macro_f1"):
        assert (changes[name]["difference"], changes[name]["p"]) == (0.0, 1.0)
    assert found["models"][0]["tasks"]["finding"]["rows"] == 5
    assert "prefill" not in found["models"][0]


def test_without_data_and_tasks_it_is_sizes(models, tmp_path, capsys):
    status, found = evaluated(tmp_path, models / "base", "--no-speed")
    assert status == 0
    assert found["baseline"] is None
    assert "perplexity" not in found["models"][0]
    assert "params" in capsys.readouterr().out


def test_models_of_two_dtypes_are_told_apart(models, tmp_path, capsys):
    shutil.copytree(models / "base", tmp_path / "half")
    tiny.model().bfloat16().save_pretrained(tmp_path / "half")
    _, found = evaluated(tmp_path, models / "base", tmp_path / "half", "--no-speed")
    assert [model["dtype"] for model in found["models"]] == ["float32", "bfloat16"]
    assert "not like for like: base in float32, half in bfloat16; " in capsys.readouterr().out
    evaluated(tmp_path, models / "base", tmp_path / "half", "--no-speed", "--dtype", "float32")
    assert "not like for like" not in capsys.readouterr().out


def test_a_second_model_does_not_begin_with_the_firsts_memory(tmp_path):
    folder = tiny.folder(tmp_path / "large")
    tiny.model(hidden_size=1024, intermediate_size=4096, num_attention_heads=8).save_pretrained(folder)
    _, found = evaluated(tmp_path, folder, folder, folder, "--no-speed")
    peaks = [model["peak_memory_mib"] for model in found["models"]]
    size = found["models"][0]["parameters"] * 4 / 2**20
    assert size > 200
    assert max(peaks[1:]) - peaks[0] < size / 2


def test_bad_input_is_one_line_before_any_model_is_loaded(models, task, tmp_path, capsys):
    nowhere, base = tmp_path / "nowhere", models / "base"
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(3))
    with_gate = (nowhere, "--tasks", task, "--baseline", base, "--fail-if")
    assert "'finding.rougeL' is unknown" in refused(capsys, *with_gate, "finding.rougeL < -2")
    assert "it needs --data" in refused(capsys, *with_gate, "ppl > +3%")
    assert "is not understood" in refused(capsys, *with_gate, "ppl")
    assert "give --baseline MODEL" in refused(capsys, nowhere, base, "--data", rows, "--fail-if", "ppl > +3%")
    assert "is the only MODEL" in refused(capsys, base, "--baseline", base)
    assert "no such file" in refused(capsys, nowhere, "--tasks", tmp_path / "none.jsonl")
    assert "no such file or folder" in refused(capsys, nowhere, "--tasks", tmp_path / "none")
    assert "--task-rows must be" in refused(capsys, nowhere, "--tasks", task, "--task-rows", 0)
    assert "--include-path" in refused(capsys, nowhere, "--tasks", task, "--include-path", tmp_path / "none")
    task.write_text('{"prompt": "a", "completion": " b", "choices": [" b", " c"], "label": 2}\n')
    assert "`label` must be a number from 0 to 1" in refused(capsys, nowhere, "--tasks", task)
    assert "no such folder" in refused(capsys, nowhere, "--data", rows)


def test_what_pairs_rows_is_asked_for_before_any_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(3))
    empty = [tmp_path / name for name in ("one", "same", "other")]  # but for their tokenizers
    for folder in empty:
        tiny.tokenizer().save_pretrained(folder)
    other = empty[2] / "tokenizer.json"
    vocabulary = json.loads(other.read_text())
    vocabulary["model"]["merges"].clear()  # which gives other windows, that cannot be paired
    other.write_text(json.dumps(vocabulary))
    assert "pip install 'atp[tasks]'" in refused(capsys, *empty[:2], "--data", rows)
    for models in (empty[:2], (empty[0], "--data", rows), (empty[0], empty[2], "--data", rows)):
        assert "atp[tasks]" not in refused(capsys, *models)


def test_tasks_are_named_by_file_or_folder(task, tmp_path):
    row = task.read_text().splitlines()[0]
    (tmp_path / "other").mkdir()
    for name in ("finding/train", "other/validation", "notes", "more notes"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    assert list(find_tasks([str(task)]).local) == ["finding"]
    assert list(find_tasks([str(task.parent)]).local) == ["finding"]
    assert list(find_tasks([str(tmp_path)]).local) == ["finding", "other"]
    words = [f"mine={task}", str(tmp_path / "notes.jsonl"), str(tmp_path / "more notes.jsonl")]
    assert find_tasks(words).metrics == dict.fromkeys(("mine", "notes", "more-notes"), ("acc", "macro_f1"))
    assert list(find_tasks([str(tmp_path / "finding" / "train.jsonl")]).local) == ["train"]
    assert len(find_tasks([str(task)], rows=5).local["finding"]) == 5
    with pytest.raises(ConfigError, match="are both called 'mine'"):
        find_tasks([f"mine={task}", f"mine={tmp_path / 'notes.jsonl'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no"):
        find_tasks([str(tmp_path / "empty")])


def test_models_are_called_by_what_tells_them_apart():
    assert short_names(["runs/a/pruned", "org/b"]) == ["pruned", "b"]
    assert short_names(["runs/a/pruned", "runs/b/pruned"]) == ["runs/a/pruned", "runs/b/pruned"]
