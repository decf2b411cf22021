"""Task scores. Oracles: log-likelihoods summed by hand, and words written one by one with the model's own logits."""

import sys

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from atp.data import TaskRow
from atp.errors import ConfigError
from atp.evaluation import check_tasks_available, score_task
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


@torch.no_grad()
def test_rouge_is_that_of_greedy_decoding_as_long_as_the_longest_completion(model):
    tokenizer = tiny.tokenizer()
    written = {prompt: greedily(model, tokenizer, prompt) for prompt in (tiny.row(i)["prompt"] for i in range(4))}
    texts = {prompt: tokenizer.decode(ids) for prompt, ids in written.items()}
    rows = [TaskRow(p, f" {text[: 5 + 2 * i]} fever") for i, (p, text) in enumerate(texts.items())]  # some overlap
    longest = max(len(tokenizer(row.completion.strip())["input_ids"]) for row in rows)
    assert longest < min(len(ids) for ids in written.values()), "or the limit would not matter"
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    heads = {prompt: tokenizer.decode(ids[:longest]).split("\n")[0] for prompt, ids in written.items()}
    wanted = [scorer.score(row.completion, heads[row.prompt])["rougeL"].fmeasure for row in rows]
    assert 0 < sum(wanted) < len(wanted)
    score = score_task("words", rows, model, tokenizer, batch_size=2)
    assert (score.metric, score.rows, score.value) == ("rougeL", 4, pytest.approx(sum(wanted) / 4))
    assert score_task("word", rows[:1], model, tokenizer).stderr is None


def greedily(model, tokenizer, prompt, tokens=40):
    """The likeliest token, one after the other."""
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-tokens:]


def test_without_the_harness_the_extra_is_named(monkeypatch):
    check_tasks_available()
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"tasks need lm_eval.*pip install 'atp\[tasks\]'"):
        check_tasks_available()
