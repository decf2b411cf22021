"""Perplexity. Oracle: log-probabilities looked up one token at a time in float64, one row at a time."""

import math

import pytest
import torch

from atp.errors import DataError
from atp.evaluation import perplexity
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    made = []
    for length, ignored in ((5, 0), (17, 6), (9, 8), (2, 0), (31, 1)):
        ids = torch.randint(384, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return made


def by_hand(model, rows):
    nll, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position in range(1, len(row["labels"])):
            if row["labels"][position] != -100:
                nll -= logits[position - 1].log_softmax(-1)[row["labels"][position]].item()
                tokens += 1
    return nll / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equals_the_sum_by_hand_whatever_the_batches(model, rows, batch_size):
    nll, tokens = by_hand(model, rows)
    measured = perplexity(model, rows, batch_size, progress=False)
    assert measured.tokens == tokens
    assert measured.nll == pytest.approx(nll, rel=1e-6)
    assert measured.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert measured.tokens_per_second == pytest.approx(sum(len(r["input_ids"]) for r in rows) / measured.seconds)


def test_spread_over_rows(model, rows):
    each = [by_hand(model, [row]) for row in rows]
    measured = perplexity(model, rows, 2, progress=False)
    assert measured.worst_row_nll == pytest.approx(max(nll for nll, _ in each), rel=1e-6)
    alike = [rows[1], rows[4], rows[1], rows[4]]  # of unequal length: residuals by hand
    together, tokens = by_hand(model, alike)
    squares = sum(((nll - together) * count) ** 2 for nll, count in (each[1], each[4], each[1], each[4]))
    found = perplexity(model, alike, 3, progress=False).nll_stderr
    assert found == pytest.approx(math.sqrt(squares * 4 / 3) / tokens, rel=1e-3)  # float32 losses, nearly alike


def test_rows_of_one_length_have_the_standard_error_of_a_mean(model):
    generator = torch.Generator().manual_seed(2)
    same = [torch.randint(384, (12,), generator=generator).tolist() for _ in range(6)]
    same = [{"input_ids": ids, "labels": ids} for ids in same]
    means = torch.tensor([by_hand(model, [row])[0] for row in same])
    found = perplexity(model, same, progress=False).nll_stderr
    assert found == pytest.approx((means.std() / math.sqrt(6)).item(), rel=1e-5)


def test_one_row_has_no_standard_error(model, rows):
    assert perplexity(model, rows[1:2], progress=False).nll_stderr is None


def test_equals_transformers_own_loss_on_one_row(model, rows):
    row = {key: torch.tensor([value]) for key, value in rows[1].items()}
    assert perplexity(model, rows[1:2], progress=False).nll == pytest.approx(model(**row).loss.item(), rel=1e-5)


def test_an_even_model_has_the_vocabulary_as_perplexity(rows):
    flat = tiny.model()
    torch.nn.init.zeros_(flat.lm_head.weight)
    assert perplexity(flat, rows, progress=False).perplexity == pytest.approx(384.0)


def test_leaves_the_training_flag_and_no_gradients(model, rows):
    model.train()
    perplexity(model, rows, progress=False)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_bfloat16_logits_are_summed_in_float32(rows):
    exact = perplexity(tiny.model(), rows, progress=False).nll
    assert perplexity(tiny.model().bfloat16(), rows, progress=False).nll == pytest.approx(exact, abs=0.02)


def test_nothing_to_count_is_an_error(model):
    with pytest.raises(DataError, match="no token has a label"):
        perplexity(model, [{"input_ids": [1, 2], "labels": [-100, -100]}], progress=False)
