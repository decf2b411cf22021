"""Task scores. Oracles: log-likelihoods summed by hand, words written one by one with the model's own logits,
scikit-learn's F1, and lm-eval run by hand on the same folder and file.
"""

import dataclasses
import json
import sys
from importlib.metadata import version
from inspect import signature

import lm_eval
import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from atp.data import TaskRow, read_task
from atp.errors import ConfigError, DataError
from atp.evaluation import check_tasks_available, compare_scores, load_named, perplexity, score_named, score_task
from atp.evaluation.tasks.harness import harnessed
from tests import tiny

CHOICES = (" fever", " cough of", " rash")


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = tiny.model()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # sharp enough for choices to differ
    return model


def likeliest(model, tokenizer, row):
    """Number of the choice with the highest sum of log p."""
    sums = []
    for choice in row.choices:
        before = len(tokenizer(row.prompt)["input_ids"])
        ids = torch.tensor(tokenizer(row.prompt + choice)["input_ids"])
        logp = model(ids[None]).logits[0].log_softmax(-1)
        sums.append(sum(logp[i - 1, ids[i]].item() for i in range(before, len(ids))))
    return sums.index(max(sums))


@pytest.mark.parametrize("bos", [False, True])
@torch.no_grad()
def test_accuracy_is_that_of_the_likeliest_choice(model, bos):
    tokenizer = tiny.tokenizer(bos)
    prompts = [tiny.row(i)["prompt"] for i in range(12)]
    unlabelled = [TaskRow(p, CHOICES[0], CHOICES, 0) for p in prompts]
    chosen = [likeliest(model, tokenizer, row) for row in unlabelled]
    assert len(set(chosen)) > 1, "or the labels would not matter"
    wrong = 3
    labels = [(c + 1) % 3 if i < wrong else c for i, c in enumerate(chosen)]
    rows = [TaskRow(p, CHOICES[label], CHOICES, label) for p, label in zip(prompts, labels, strict=True)]
    model.train()
    score = score_task("finding", rows, model, tokenizer, batch_size=5)
    assert model.training
    share = 1 - wrong / len(rows)
    assert (score.metric, score.rows, score.value) == ("acc", 12, pytest.approx(share))
    assert score.stderr == pytest.approx((share * (1 - share) / (len(rows) - 1)) ** 0.5)
    assert score.items["acc"] == [0.0] * wrong + [1.0] * (len(rows) - wrong)
    assert score.metrics["macro_f1"].value == pytest.approx(f1_score(labels, chosen, average="macro"))
    assert score.metrics["acc"].low < share < score.metrics["acc"].high


@torch.no_grad()
def test_rouge_is_that_of_greedy_decoding_as_long_as_the_longest_completion(model):
    tokenizer = tiny.tokenizer()
    written = {prompt: greedily(model, tokenizer, prompt) for prompt in (tiny.row(i)["prompt"] for i in range(4))}
    texts = {prompt: tokenizer.decode(ids) for prompt, ids in written.items()}
    rows = [TaskRow(p, f" {text[: 5 + 2 * i]} fever") for i, (p, text) in enumerate(texts.items())]  # some overlap
    longest = max(len(tokenizer(row.completion.strip())["input_ids"]) for row in rows)
    assert longest < min(len(ids) for ids in written.values()), "or the limit would not matter"
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    heads = {prompt: tokenizer.decode(ids[:longest]).split("\n")[0] for prompt, ids in written.items()}
    found = [scorer.score(row.completion, heads[row.prompt]) for row in rows]
    wanted = {name: [each[name].fmeasure for each in found] for name in ("rouge1", "rouge2", "rougeL")}
    assert 0 < sum(wanted["rougeL"]) < len(rows)
    score = score_task("words", rows, model, tokenizer, batch_size=2)
    assert (score.metric, score.rows, score.value) == ("rougeL", 4, pytest.approx(sum(wanted["rougeL"]) / 4))
    assert score.items == {name: pytest.approx(values) for name, values in wanted.items()}
    assert score.protocol["max_gen_toks"] == longest
    assert score_task("word", rows[:1], model, tokenizer).stderr is None


def greedily(model, tokenizer, prompt, tokens=40):
    """The likeliest token, one after the other."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-tokens:]


def choice_rows(count=12, labels=None):
    prompts = [tiny.row(i)["prompt"] for i in range(count)]
    labels = labels or [i % 3 for i in range(count)]
    return [TaskRow(p, CHOICES[label], CHOICES, label) for p, label in zip(prompts, labels, strict=True)]


def task_file(path, rows):
    names = {"choice": ("prompt", "completion", "choices", "label"), "generation": ("prompt", "completion")}
    fields = [
        {name: getattr(row, name) for name in names.get(row.kind, ())} or {"text": row.completion} for row in rows
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in fields))
    return path


BY_HAND = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}


def definition(folder, kind, file):
    """A task of lm-eval on a local file."""
    folder.mkdir(exist_ok=True)
    about = {
        "task": f"by_hand_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "target_delimiter": "",
    }
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump(about | BY_HAND[kind]))
    return about["task"]


def test_scores_are_those_of_lm_eval_by_hand_on_the_same_folder(model, tmp_path):
    """Long and short prompts, so that batches are padded and logits left out, and one that does not fit."""
    tokenizer, folder = tiny.tokenizer(), tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = choice_rows()
    rows[3] = dataclasses.replace(rows[3], prompt=" ".join(row.prompt for row in rows) * 3)
    rows[5] = dataclasses.replace(rows[5], prompt="Case")
    texts = [TaskRow("", row.prompt) for row in rows]
    files = {"choice": task_file(tmp_path / "choice.jsonl", rows), "text": task_file(tmp_path / "text.jsonl", texts)}
    names = {kind: definition(tmp_path / "tasks", kind, file) for kind, file in files.items()}
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(names.values()),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    assert 0 < by_hand[names["choice"]]["acc,none"] < 1
    ours = {kind: score_task(kind, read_task(str(file)), model, tokenizer) for kind, file in files.items()}
    assert ours["choice"].value == by_hand[names["choice"]]["acc,none"]
    bits = by_hand[names["text"]]["bits_per_byte,none"]
    assert ours["text"].metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-6)
    assert ours["choice"].truncated == 1
    assert ours["text"].truncated == 0
    for kind, named in score_of_named(names, tmp_path, model, tokenizer).items():
        for metric, estimate in named.metrics.items():
            assert estimate.value == pytest.approx(by_hand[names[kind]][f"{metric},none"], rel=1e-6)


def score_of_named(names, tmp_path, model, tokenizer):
    found = score_named(load_named([*names.values()], str(tmp_path / "tasks")), model, tokenizer)
    return {kind: found[name] for kind, name in names.items()}


def test_a_named_task_keeps_rows_and_is_paired(model, tmp_path):
    name = definition(tmp_path / "tasks", "choice", task_file(tmp_path / "rows.jsonl", choice_rows()))
    (task,) = load_named([name], str(tmp_path / "tasks"))
    assert task.metrics == ("acc", "acc_norm")
    other, tokenizer = tiny.model(), tiny.tokenizer()
    whole, few = score_named([task], model, tokenizer)[name], score_named([task], model, tokenizer, rows=5)[name]
    assert (whole.kind, whole.rows, few.rows) == ("harness", 12, 5)
    assert few.items["acc"] == [whole.items["acc"][i] for i in (0, 2, 4, 7, 9)]
    assert whole.protocol["shots"] == 0
    assert whole.stderr > 0
    again = score_named([task], other, tokenizer)[name]
    found = compare_scores(name, whole, again)
    assert found["acc"].difference == pytest.approx(again.value - whole.value)
    assert found["acc"].test == "McNemar, exact"
    with pytest.raises(DataError, match="scored on different rows"):
        compare_scores(name, whole, few)


def test_unknown_names_and_data_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "own" / "manager.py"))  # 12,000 files else
    name = definition(tmp_path / "tasks", "choice", tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="'nothing_like_it' is neither a .jsonl file"):
        load_named(["nothing_like_it"], str(tmp_path / "tasks"))
    with pytest.raises(DataError, match=f"{name}: lm-eval cannot load the data: .*none.jsonl"):
        load_named([name], str(tmp_path / "tasks"))


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_read_from_one_start_token_to_its_end_in_windows(bos):
    model, tokenizer = tiny.model(max_position_embeddings=16), tiny.tokenizer(bos)
    texts = [tiny.row(1)["prompt"], " ".join(tiny.row(i)["prompt"] for i in range(4))]
    score = score_task("text", [TaskRow("", text) for text in texts], model, tokenizer)
    windows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) > 16 or text == texts[0]
        # windows of 16 predictions, each after one token; the last one reaches back to be as long as the others
        before = [tokenizer.bos_token_id, *ids]
        for first in range(0, len(ids), 16):
            start = max(min(first, len(ids) - 16), 0)
            window = before[start : start + 17]
            windows.append({"input_ids": window, "labels": [-100] * (first - start + 1) + window[first - start + 1 :]})
    wanted = perplexity(model, windows, progress=False)
    assert score.items["tokens"] == [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    assert (score.metric, score.rows) == ("ppl", 2)
    assert sum(score.items["nll"]) == pytest.approx(wanted.nll * wanted.tokens, rel=1e-5)
    assert score.value == pytest.approx(wanted.perplexity, rel=1e-5)


@torch.no_grad()
def test_a_long_prompt_loses_its_start_and_is_counted():
    model, tokenizer = tiny.model(max_position_embeddings=24), tiny.tokenizer()
    long, short = " ".join(tiny.row(i)["prompt"] for i in range(5)), "Case 1:"
    end = tokenizer.decode(tokenizer(long)["input_ids"][-23:])
    assert len(tokenizer(end)["input_ids"]) == 23
    rows = [TaskRow(prompt, " fever", CHOICES, 0) for prompt in (long, short)]
    score = score_task("cut", rows, model, tokenizer)
    assert (score.truncated, score.rows) == (1, 2)
    assert "loses its start" in score.protocol["truncation"]
    kept = [TaskRow(prompt, " fever", CHOICES, 0) for prompt in (end, short)]
    assert score_task("kept", kept, model, tokenizer).items["chosen"] == score.items["chosen"]
    words = [TaskRow(prompt, " fever") for prompt in (long, short)]
    assert score_task("words", words, model, tokenizer).truncated == 1


def test_what_is_to_be_scored_must_fit_the_context():
    model, tokenizer = tiny.model(max_position_embeddings=8), tiny.tokenizer()
    long = " fever cough renal cyst heart valve nerve palsy rash anaemia"
    with pytest.raises(DataError, match="t, row 2: .* tokens .* the model's context has 8"):
        score_task("t", [TaskRow("a", " b", (" b", " c"), 0), TaskRow("a", long, (long, " c"), 0)], model, tokenizer)
    with pytest.raises(DataError, match="t, row 1: .* the model's context has 8"):
        score_task("t", [TaskRow("a", long)], model, tokenizer)


@pytest.mark.parametrize("kind", ["choice", "generation", "text"])
def test_a_tokenizer_without_padding_and_end_scores_the_same(model, kind):
    """Writing ends at the line's end: the likeliest token is never the end-of-text token here."""
    bare = tiny.tokenizer()
    bare.pad_token = bare.eos_token = None
    rows = {
        "choice": choice_rows(),
        "generation": [TaskRow(**tiny.row(i)) for i in range(4)],
        "text": [TaskRow("", tiny.row(i)["prompt"]) for i in range(4)],
    }[kind]
    found = score_task(kind, rows, model, bare)
    assert found.items == score_task(kind, rows, model, tiny.tokenizer()).items
    assert bare.eos_token is None, "the user's own tokenizer stays as it was"
    bare.bos_token = None
    assert score_task(kind, rows, model, bare).rows == len(rows)


def test_classes_go_by_the_choices_text_where_all_rows_have_the_same(model):
    tokenizer, rows = tiny.tokenizer(), choice_rows()
    turned = [dataclasses.replace(r, choices=r.choices[::-1], label=2 - r.label) for r in rows]
    plain = score_task("plain", rows, model, tokenizer)
    mixed = score_task("mixed", [*rows[:6], *turned[6:]], model, tokenizer)
    assert mixed.protocol["classes"] == list(CHOICES)
    assert mixed.metrics["macro_f1"] == plain.metrics["macro_f1"]
    other = dataclasses.replace(rows[0], choices=(*CHOICES[:2], " palsy"), completion=CHOICES[0], label=0)
    assert score_task("own", [other, *rows[1:]], model, tokenizer).protocol["classes"] == "numbers of choices"


def test_a_score_is_plain_values_with_its_protocol(model):
    rows = choice_rows()
    score = score_task("t", [*rows, rows[0]], model, tiny.tokenizer(), batch_size=3)
    plain = json.loads(json.dumps(dataclasses.asdict(score)))
    assert plain["metrics"]["acc"].keys() == {"value", "stderr", "low", "high"}
    known = {"shots": 0, "duplicates": 1, "batch_size": 3, "dtype": "float32", "context_tokens": 256}
    assert known.items() <= plain["protocol"].items()
    assert plain["protocol"]["lm_eval"] == version("lm_eval")
    assert score.fingerprint != score_task("t", rows, model, tiny.tokenizer()).fingerprint


@torch.no_grad()
def test_only_the_logits_that_are_scored_are_computed(model, monkeypatch):
    widths = []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        widths.append(forward(self, *args, **kwargs))
        return widths[-1]

    monkeypatch.setattr(type(model), "forward", watched)
    watched.__signature__ = signature(forward)
    score_task("t", choice_rows(4), model, tiny.tokenizer())
    assert {output.logits.shape[1] < 8 for output in widths} == {True}


def test_padding_is_never_taken_for_less_than_it_is(model):
    with harnessed(model, tiny.tokenizer(), 2) as lm:
        lm.longest = 2
        ids = torch.tensor([[5, 6, 7, 8, 9, 3], [5, 6, 7, 0, 0, 0], [5, 0, 7, 8, 0, 0]])
        assert lm._model_call(ids).shape[1] == 5
        assert lm._model_call(torch.zeros(1, 6, dtype=torch.long)).shape[1] == 6


def test_without_the_harness_the_extra_is_named(monkeypatch):
    check_tasks_available()
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"tasks need lm_eval.*pip install 'atp\[tasks\]'"):
        check_tasks_available()
