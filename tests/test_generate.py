"""`atp generate`, in this process. Oracles: the files left behind, read as any other data; the dense tuned model."""

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from atp.cli import INTERRUPTED, main
from atp.data import fingerprint, read_rows
from atp.loading import load_dense
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("base"), words=True)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generated(base, *options):
    """What the command says of itself, and the lines it wrote."""
    short = ("--rows", 6, "--tokens", 20, "--language", "none", "--json", "results.json")
    assert main([str(word) for word in ("generate", base, "out.jsonl", *short, *options)]) == 0
    with open("out.jsonl", encoding="utf-8") as lines:
        return json.loads(open("results.json", encoding="utf-8").read()), [json.loads(line) for line in lines]


def refused(capsys, *argv):
    """The one line that a refused command prints, but for the bars of what it did until then."""
    capsys.readouterr()
    assert main(["generate", *(str(word) for word in argv)]) == 2
    lines = [part for part in re.split(r"[\r\n]+", capsys.readouterr().err) if part.strip() and "%|" not in part]
    assert len(lines) == 1, lines
    return lines[0]


def texts(path, count):
    """Texts of words that the tokenizer knows, so that the model does not learn to write none."""
    draw = random.Random(count)
    words = sorted(set(tiny.word_tokenizer().get_vocab()) - {"<s>", "</s>", "<unk>"})
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=15))}) + "\n" for _ in range(count)))
    return path


def test_rows_are_written_and_how_they_were_made(base, tmp_path, capsys):
    results, rows = generated(base)
    assert [list(row) for row in rows] == [["text", "source"]] * 6
    assert {row["source"] for row in rows} == {"generated"}
    vocabulary = set(tiny.word_tokenizer().get_vocab())
    assert all(set(row["text"].split()) <= vocabulary and len(row["text"].split()) >= 10 for row in rows)
    assert {file.name for file in tmp_path.iterdir()} == {"out.jsonl", "out.meta.json", "results.json"}
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert results == {"out": "out.jsonl", **meta, "seconds": results["seconds"]}
    assert meta["fingerprints"] == {"rows": fingerprint(read_rows("out.jsonl"))}
    assert meta["attempts"] == meta["generated"] + sum(meta["dropped"].values())
    assert (meta["rows"], meta["generated"], meta["real"], meta["model"]) == (6, 6, 0, str(base))
    assert meta["settings"] == {
        "rows": 6,
        "share": 1.0,
        "tokens": 20,
        "greedy_tokens": 4,
        "temperature": 1.0,
        "top_p": 0.95,
        "languages": [],
        "batch_size": 8,
        "max_attempts": 60,
        "seed": 0,
    }
    assert "attempts" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_files(base, tmp_path):
    def files(*options):
        generated(base, *options, "--overwrite")
        return [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.meta.json")]

    first = files("--seed", 3)
    torch.manual_seed(99)
    assert files("--seed", 3) == first
    assert files("--seed", 4)[0] != first[0]


def test_prompts_and_real_rows_stay_pairs_and_nothing_held_out_is_there(base, tmp_path):
    train = tiny.jsonl(tmp_path / "train.jsonl", range(12))
    held_out = tiny.jsonl(tmp_path / "test.jsonl", range(3))
    extra = tmp_path / "extra.jsonl"
    extra.write_text(json.dumps({"text": tiny.row(3)["prompt"] + tiny.row(3)["completion"]}))
    options = ("--prompts", train, "--real", train, "--share", 0.5, "--rows", 10)
    results, rows = generated(base, *options, "--disjoint-from", held_out, "--disjoint-from", extra)
    real = [row for row in rows if row["source"] == "real"]
    own = [row for row in rows if row["source"] == "generated"]
    assert (len(real), len(own)) == (results["real"], results["generated"]) == (5, 5)
    allowed = [tiny.row(i) for i in range(4, 12)]
    assert all({"prompt": row["prompt"], "completion": row["completion"]} in allowed for row in real)
    assert {row["prompt"] for row in own} <= {row["prompt"] for row in allowed}
    assert not {row["completion"] for row in own} & {row["completion"] for row in allowed}
    assert (results["real_dropped"]["held_out"], results["prompts_dropped"]) == (4, 4)
    assert results["settings"]["greedy_tokens"] == 0
    sources = results["fingerprints"]
    assert sources["prompts"] == sources["real"] == fingerprint(read_rows(str(train)))
    assert sources["disjoint_from"] == fingerprint(read_rows([str(held_out), str(extra)]))


def test_the_dense_tuned_model_of_a_run_writes_and_a_run_calibrates_on_it(base, tmp_path):
    recipe = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "train": str(texts(tmp_path / "train.jsonl", 120)),
            "validation": str(texts(tmp_path / "validation.jsonl", 20)),
            "max_length": 16,
        },
        "lora": {"r": 4},
        "atp": {"sparsity": 0.4, "calibration_rows": 4, "calibration_batch_size": 2},
        "training": {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.02, "disable_tqdm": True},
        "output_dir": "run",
        "measure_base": False,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    greedy = ("--greedy-tokens", 6, "--rows", 4, "--overwrite")
    results, rows = generated("run", *greedy)
    of_base = generated(base, *greedy)[1]
    begun = [[" ".join(row["text"].split()[:7]) for row in found] for found in (rows, of_base)]
    assert begun[0] != begun[1], "the base model writes otherwise"
    tuned, tokenizer = load_dense("run").eval(), tiny.word_tokenizer()
    for row in rows:
        ids = tokenizer(row["text"])["input_ids"]
        with torch.no_grad():
            likeliest = tuned(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
        assert ids[1:7] == likeliest[:6]
    assert results["generated"] == 4

    generated("run", "--rows", 16, "--overwrite", "--disjoint-from", "validation.jsonl")
    assert main(["train", "recipe.yaml", "--output_dir", "again", "--data.calibration", "out.jsonl"]) == 0
    data = json.loads((tmp_path / "again" / "metrics.json").read_text())["data"]
    assert data["rows"]["calibration"] == 16
    assert data["fingerprints"]["calibration"] == fingerprint(read_rows("out.jsonl"))


def test_the_language_is_english_where_texts_begin_at_random(base, capsys, monkeypatch):
    pytest.importorskip("py3langid")
    argv = ("generate", base, "out.jsonl", "--rows", 2, "--tokens", 20, "--max-attempts", 6)
    line = refused(capsys, *argv[1:])
    assert "none of 6 texts passed (dropped: language 6)" in line, "syllables are no English"
    assert "language 'english' is not known" in refused(capsys, *argv[1:], "--language", "english")
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'atp[language]', or give --language none" in refused(capsys, *argv[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", 0], "rows=0 is not allowed"),
        (["--tokens", 0], "tokens=0 is not allowed: it must be an integer >= 1"),
        (["--tokens", 300], "tokens=300 is not allowed: the model's context has 256"),
        (["--greedy-tokens", -1], "greedy_tokens=-1 is not allowed"),
        (["--temperature", 0], "temperature=0.0 is not allowed"),
        (["--top-p", 2], "top_p=2.0 is not allowed"),
        (["--batch-size", 0], "batch_size=0 is not allowed"),
        (["--max-attempts", 0], "max_attempts=0 is not allowed"),
        (["--seed", -1], "seed=-1 is not allowed"),
        (["--share", 0.5], "--share 0.5 leaves rows that are not written: give --real"),
        (["--real", "rows.jsonl", "--share", 1.5], "share=1.5 is not allowed"),
        (["--real", "rows.jsonl", "--rows", 100], "50 real rows are asked for, and there are 4"),
        (["--prompts", "none.jsonl"], "none.jsonl: no such file"),
        (["--prompts", "empty.jsonl"], "empty.jsonl: holds no rows"),
        (["--prompts", "blank.jsonl"], "none of 1 prompts can be used"),
        (["--prompts", "rows.jsonl", "--disjoint-from", "rows.jsonl"], "all of 4 prompts are held out"),
        (["--disjoint-from", "none.jsonl"], "none.jsonl: no such file"),
        (["--base", "x"], "--base is for runs"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(base, tmp_path, capsys, options, message):
    tiny.jsonl(tmp_path / "rows.jsonl", range(4))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, base, "made/out.jsonl", "--tokens", 20, "--language", "none", *options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_is_taken_or_cannot_be_written_is_refused(base, tmp_path, capsys):
    rows = tiny.jsonl(tmp_path / "rows.jsonl", range(4))
    assert "rows.jsonl exists: choose another name or give --overwrite" in refused(capsys, base, "rows.jsonl")
    replaced = ("rows.jsonl", "--overwrite", "--real", rows)
    assert "rows.jsonl is read, too, and would be replaced" in refused(capsys, base, *replaced)
    assert "ends in .jsonl" in refused(capsys, base, "out.txt")
    assert "is a file, no folder" in refused(capsys, base, "rows.jsonl/out.jsonl")
    assert "no such folder" in refused(capsys, "./nowhere", "out.jsonl", "--language", "none")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(base, tmp_path, capsys, monkeypatch):
    asked = []

    def access(path, mode):
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr("os.access", access)
    line = refused(capsys, base, "made/new/out.jsonl", "--tokens", 20, "--language", "none")
    assert line.endswith(f"made/new: nothing can be written to {tmp_path}: choose another place")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError])
def test_what_is_interrupted_leaves_what_was_there(base, tmp_path, monkeypatch, interrupt):
    generated(base)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_text, beside = Path.write_text, []

    def stop(path, text, encoding):
        if "meta" in path.name:
            beside.extend(tmp_path.glob(".out.jsonl.*"))
            raise interrupt("stop")
        write_text(path, text, encoding)

    monkeypatch.setattr(Path, "write_text", stop)
    argv = ["generate", str(base), "out.jsonl", "--rows", "2", "--tokens", "20", "--language", "none", "--overwrite"]
    assert main(argv) == (2 if interrupt is OSError else INTERRUPTED)
    assert len(beside) == 1, "the rows were written beside by then"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
