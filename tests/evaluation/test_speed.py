"""Speed and size. Oracles: arithmetic on the reported latency; weights and files counted by hand."""

import pytest

from atp.evaluation import count_parameters, folder_bytes, generation_speed, prefill_speed
from atp.evaluation.speed import _speed
from tests import tiny


def test_speeds_are_tokens_over_the_median_latency():
    model = tiny.model()
    prefill = prefill_speed(model, batch_size=2, prompt_tokens=12, calls=3)
    assert prefill.tokens_per_second == pytest.approx(24 / (prefill.latency_ms / 1e3))
    generation = generation_speed(model, batch_size=2, prompt_tokens=4, generated_tokens=3, calls=1)
    assert generation.tokens_per_second == pytest.approx(6 / (generation.latency_ms / 1e3))
    assert (prefill.calls, generation.calls) == (3, 1)
    assert 0 < prefill.p20_ms <= prefill.latency_ms <= prefill.p80_ms
    assert generation.p20_ms == generation.latency_ms == generation.p80_ms, "of a single call"


def test_percentiles_lie_between_neighbours_by_their_distance():
    speed = _speed(100, [0.010, 0.020, 0.030, 0.040, 0.060, 0.070])
    assert (speed.p20_ms, speed.latency_ms, speed.p80_ms) == pytest.approx((20, 35, 60))
    assert speed.tokens_per_second == pytest.approx(100 / 0.035)


def test_generation_makes_exactly_the_asked_tokens(monkeypatch):
    model = tiny.model()
    lengths = []
    generate = type(model).generate

    def watched(self, *args, **kwargs):
        output = generate(self, *args, **kwargs)
        lengths.append(output.shape[1])
        return output

    monkeypatch.setattr(type(model), "generate", watched)
    generation_speed(model, prompt_tokens=4, generated_tokens=5, calls=2, warmup_calls=1)
    assert lengths == [9, 9, 9]


def test_tied_weights_count_once():
    untied, tied = tiny.model(), tiny.model(tie_word_embeddings=True)
    assert count_parameters(untied) - count_parameters(tied) == 384 * 32


def test_folder_bytes_reach_into_sub_folders(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "inner" / "b").write_bytes(b"4567")
    assert folder_bytes(tmp_path) == 7


def test_the_bytes_of_a_model_are_of_its_own_files(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.pth").write_bytes(b"of another format")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert folder_bytes(tmp_path) == 2
