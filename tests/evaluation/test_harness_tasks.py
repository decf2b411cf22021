"""The harness's own tasks by their names: its prompts and metrics, on rows that stand in for the hub's data sets.

Oracle: lm-eval run by hand on the same folder, tasks and rows.
"""

import datasets
import lm_eval
import pytest
import torch
from datasets import Dataset, DatasetDict

from atp.evaluation import load_named, score_named
from tests import tiny

LETTERS = "ABCD"
ROWS = range(12)


def letters(index):
    """Four words that differ from row to row."""
    return [f"{tiny.WORDS[(index + step) % len(tiny.WORDS)]} {index}" for step in range(4)]


def finding(index):
    return tiny.row(index)["prompt"]


HUB = {
    "bigbio/pubmed_qa": lambda i: {
        "CONTEXTS": [finding(i), finding(i + 1)],
        "QUESTION": f"Is it {tiny.WORDS[i % 10]}?",
        "final_decision": ("yes", "no", "maybe")[i % 3],
    },
    "GBaker/MedQA-USMLE-4-options-hf": lambda i: {
        "sent1": finding(i),
        "label": i % 4,
        **{f"ending{n}": word for n, word in enumerate(letters(i))},
    },
    "openlifescienceai/medmcqa": lambda i: {
        "question": finding(i),
        "cop": i % 4,
        **{f"op{letter.lower()}": word for letter, word in zip(LETTERS, letters(i), strict=True)},
    },
    "cais/mmlu": lambda i: {"question": finding(i), "choices": letters(i), "answer": i % 4},
    "nguha/legalbench": lambda i: {"text": finding(i), "answer": ("generic", "fanciful")[i % 2]},
}
NAMES = ("pubmedqa", "medqa_4options", "medmcqa", "mmlu_professional_law", "legalbench_abercrombie")


@pytest.fixture
def _no_hub(monkeypatch):
    """`load_dataset` gives rows of the columns that the hub's data sets have."""

    def stand_in(path, *_args, **_kwargs):
        rows = Dataset.from_list([HUB[path](i) for i in ROWS])
        return DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), rows))

    monkeypatch.setattr(datasets, "load_dataset", stand_in)


@pytest.mark.usefixtures("_no_hub")
def test_scores_by_name_are_those_of_lm_eval_by_hand(tmp_path):
    torch.manual_seed(1)
    model, tokenizer = tiny.model(max_position_embeddings=2048), tiny.tokenizer()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # sharp enough for choices to differ
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    by_hand = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path), "dtype": "float32"},
        tasks=list(NAMES),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    found = score_named(load_named(NAMES), model.eval(), tokenizer, batch_size=4)
    assert found.keys() == set(NAMES)
    for name, score in found.items():
        assert score.rows == len(ROWS)
        theirs = {key: value for key, value in by_hand[name].items() if "," in key and "stderr" not in key}
        assert len(theirs) == len(score.metrics) > 0
        for metric, estimate in score.metrics.items():
            key = metric if "," in metric else f"{metric},none"
            assert estimate.value == pytest.approx(theirs[key]), (name, metric)
    assert any(0 < score.value < 1 for score in found.values())
