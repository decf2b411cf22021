"""Texts that a model writes itself. Oracles: the model's own argmax, step by step; counts by hand; real sentences."""

import dataclasses
import random
from itertools import islice

import pytest
import torch
from transformers import GenerationConfig

from atp.data import Row
from atp.errors import CalibrationError, ConfigError
from atp.recovery.generation import Mix, WritingSettings, mixed_rows
from atp.recovery.generation.collecting import collect, starts_for
from atp.recovery.generation.filters import REASONS, Filters, HeldOut
from atp.recovery.generation.language import language_test
from atp.recovery.generation.overlap import Overlaps
from atp.recovery.generation.starts import Start, prompt_starts, random_starts
from atp.recovery.generation.writing import Writer, Written
from tests import tiny

SETTINGS = WritingSettings(tokens=24, greedy_tokens=4, batch_size=4, max_attempts=60)


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def speaker():
    """Model and tokenizer that write words."""
    return tiny.model().eval(), tiny.word_tokenizer()


def greedy(model, ids, tokens):
    """The likeliest tokens after `ids`, one forward pass each."""
    ids = list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return tuple(ids[-tokens:])


def words(seed, count=40):
    """A text of its own for every seed."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefgh", k=5)) for _ in range(count))


def written(text, ids=tuple(range(40)), prompt=""):
    return Written(Start((5,), prompt), tuple(ids), text)


def test_first_tokens_are_any_but_special_and_added_ones():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<unused>"])
    drawn = [start.ids for start in islice(random_starts(tokenizer, 384, random.Random(0)), 4000)]
    usual = set(tokenizer.get_vocab().values()) - {0, 1, tokenizer.get_added_vocab()["<unused>"]}
    assert {ids[0] for ids in drawn} == usual, "4,000 draws miss one of 382 once in 100 seeds"
    assert max(drawn.count(ids) for ids in set(drawn)) < 30, "about 10 each"
    assert {len(ids) for ids in drawn} == {1}
    few = [start.ids[0] for start in islice(random_starts(tokenizer, 100, random.Random(0)), 1000)]
    assert max(few) == 99, "the embedding may have fewer rows than the tokenizer has tokens"
    for bos in islice(random_starts(tiny.tokenizer(bos=True), 384, random.Random(0)), 20):
        assert bos.ids[0] == 0
        assert len(bos.ids) == 2
        assert bos.ids[1] > 1


@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_few_greedy_tokens_then_sampling(model, tokenizer, count):
    settings = dataclasses.replace(SETTINGS, greedy_tokens=count)
    starts = list(islice(random_starts(tokenizer, 384, random.Random(0)), 8))
    texts = Writer(model, tokenizer, settings).write(starts, seed=1)
    others = Writer(model, tokenizer, settings).write(starts, seed=2)
    for start, text, other in zip(starts, texts, others, strict=True):
        expected = greedy(model, start.ids, max(count, 1))
        assert text.start is start
        assert (text.ids[:count] == expected[:count]) or 1 in expected
        assert text.ids[:count] == other.ids[:count]
    pairs = zip(texts, others, strict=True)
    after = [(text.ids[count : count + 1], other.ids[count : count + 1]) for text, other in pairs]
    assert sum(a == b for a, b in after) <= 2, "the next one is sampled: of 384 tokens, all nearly as likely"
    assert any(text.ids[: count + 1] != greedy(model, text.start.ids, count + 1) for text in texts)


def test_padded_prompts_are_gone_on_with_as_if_each_were_alone(model, tokenizer):
    settings = dataclasses.replace(SETTINGS, tokens=6, greedy_tokens=6)
    rows = [Row("Case 3:", ""), Row(tiny.row(1)["prompt"], ""), Row(tiny.row(2)["prompt"] * 2, "")]
    starts = list(islice(prompt_starts(rows, tokenizer, None, random.Random(0)), 3))
    assert len({len(start.ids) for start in starts}) == 3
    for text in Writer(model, tokenizer, settings).write(starts, seed=0):
        assert text.ids == greedy(model, text.start.ids, 6)
        assert tokenizer.decode(text.ids).startswith(text.text)
        assert tokenizer.decode(text.start.ids) == text.start.prompt


def test_the_models_own_generation_settings_are_put_aside_and_back(tokenizer):
    start = [Start((7,)), Start((200,))]
    plain = Writer(tiny.model().eval(), tokenizer, SETTINGS).write(start, seed=0)
    model = tiny.model().train()
    model.generation_config = own = GenerationConfig(
        top_k=1, repetition_penalty=9.0, min_new_tokens=3, max_length=5, suppress_tokens=[9], eos_token_id=1
    )
    assert Writer(model, tokenizer, SETTINGS).write(start, seed=0) == plain
    assert model.generation_config is own
    assert model.training


def test_a_text_ends_where_the_model_ends_it(tokenizer):
    model = tiny.model().eval()
    first = Writer(model, tokenizer, SETTINGS).write([Start((7,))], seed=0)[0]
    model.generation_config.eos_token_id = [1, first.ids[6]]
    ended = Writer(model, tokenizer, SETTINGS).write([Start((7,)), Start((200,))], seed=0)
    assert first.ids[6] not in {token for text in ended for token in text.ids}
    assert len(Writer(model, tokenizer, SETTINGS).write([Start((7,))], seed=0)[0].ids) <= 6


def test_prompts_are_all_used_before_one_comes_again(tokenizer):
    rows = [*(Row(f"Case {i}:", " x") for i in range(5)), Row("", "one two three four five six seven eight nine ten")]
    starts = list(islice(prompt_starts(rows, tokenizer, None, random.Random(0)), 12))
    texts = [tokenizer.decode(start.ids) for start in starts]
    assert (
        sorted(texts[:6])
        == sorted(texts[6:])
        == sorted([*(f"Case {i}:" for i in range(5)), "one two three four five six seven eight"])
    )
    assert texts[:6] != texts[6:]
    assert [start.prompt for start in starts if "Case" not in start.prompt] == ["", ""]
    assert list(prompt_starts([Row(" ", ""), Row("", "")], tokenizer, None, random.Random(0))) == []
    assert list(prompt_starts(rows, tokenizer, 1, random.Random(0))) == []


@pytest.mark.parametrize("prompts", [None, [Row(**tiny.row(i)) for i in range(6)]])
def test_the_seed_decides_and_nothing_else_is_touched(speaker, prompts):
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    mix = Mix(5, prompts=prompts)
    first, again = (mixed_rows(*speaker, mix, SETTINGS, progress=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert first == again
    other = mixed_rows(*speaker, mix, dataclasses.replace(SETTINGS, seed=1), progress=False)
    assert {row for row, _ in other.rows} != {row for row, _ in first.rows}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (written(words(0)), None),
        (written("  \n"), "broken"),
        (written("a \N{REPLACEMENT CHARACTER} b"), "broken"),
        (written(words(0), ids=range(10)), "short"),
        (written(words(0), ids=[1, 2, 3, 4] * 20), "repetitive"),
        (written(words(0), ids=[*range(100, 130), *[9] * 20]), None),
        (written(words(1), prompt="held out"), "held_out"),
        (written(words(1).title().replace(" ", ",  ")), "held_out"),
        (written(" Known  SHORT row"), "duplicate"),
        (written(f"{words(2)} {words(3, 30)}", prompt="any"), "near_duplicate"),
    ],
)
def test_texts_are_dropped_for_the_reason_they_should_be(text, reason):
    filters = Filters(SETTINGS, [Row("known", " short row"), Row("", words(2))], HeldOut([Row("", words(1))]))
    assert filters.reason(text) == reason


def test_texts_are_compared_with_those_kept_before():
    filters = Filters(SETTINGS, [], HeldOut([]))
    assert filters.reason(written(words(0))) is None
    assert filters.reason(written(words(0).upper())) == "duplicate"
    assert filters.reason(written(f"{words(0)} and")) == "near_duplicate"
    assert filters.reason(written(" yes", prompt="Is it?")) is None
    assert filters.reason(written(" yes", prompt="Was it?")) is None, "too few words to be nearly another's"
    assert filters.reason(written(words(4), prompt="Is it?")) is None, "a prompt may come again"


@pytest.mark.parametrize(("shared", "overlaps"), [(40, True), (27, True), (26, False), (0, False)])
def test_more_than_half_of_the_runs_of_13_words_is_an_overlap(shared, overlaps):
    """Of 40 words there are 28 runs; of 27 words in common 15 runs, of 26 words 14."""
    whole, other = words(0), words(1)
    mixed = " ".join([*whole.split()[:shared], *other.split()[shared:]])
    assert Overlaps([other[:0], whole]).overlaps(mixed) is overlaps
    assert Overlaps([mixed]).overlaps(f"{words(2, 500)} {whole}") is overlaps, "also where it is a small part"


SENTENCES = {
    "en": "The patient was admitted to the hospital with a high fever and was treated for two weeks.",
    "de": "Der Patient wurde mit hohem Fieber in das Krankenhaus eingeliefert und zwei Wochen lang behandelt.",
    "fr": "Le patient a été admis à l'hôpital avec une forte fièvre et il a été soigné pendant deux semaines.",
    "es": "El paciente fue ingresado en el hospital con fiebre alta y recibió tratamiento durante dos semanas.",
    "zh": "病人因高烧住进了医院并接受了两个星期的治疗。",
    "ja": "患者は高熱で入院し二週間の治療を受けました",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_languages_are_told_apart(language):
    pytest.importorskip("py3langid")
    asked = dataclasses.replace(SETTINGS, languages=(language,))
    filters = Filters(asked, [], HeldOut([]))
    kept = {name for name, sentence in SENTENCES.items() if filters.reason(written(sentence)) != "language"}
    assert kept == {language}
    assert all(language_test(tuple(SENTENCES))(sentence) for sentence in SENTENCES.values())
    code = "def _compute(d):\n    if d == 0:\n        return d, -1\n    return -1, max(d - 2, 0)\ntotal += d * sl"
    assert filters.reason(written(code)) == "language"


def test_an_unknown_language_is_named():
    pytest.importorskip("py3langid")
    with pytest.raises(ConfigError, match=r"language 'english' is not known: give none, or some of .*\ben\b"):
        language_test(("de", "english"))


@pytest.mark.parametrize(("share", "generated"), [(1.0, 12), (0.75, 9), (0.5, 6), (0.1, 1), (0.0, 0)])
def test_the_share_is_exact_and_rows_are_mixed(speaker, share, generated):
    real = [Row(**tiny.row(i)) for i in range(30)]
    mixed = mixed_rows(*speaker, Mix(12, share, real=[*real, real[0]]), SETTINGS, progress=False)
    of_model = [row for row, own in mixed.rows if own]
    drawn = [row for row, own in mixed.rows if not own]
    assert (len(of_model), len(drawn)) == (generated, 12 - generated)
    assert set(drawn) <= set(real)
    assert len(set(drawn)) == len(drawn)
    assert not set(of_model) & set(real)
    assert mixed.real_dropped == {"held_out": 0, "duplicate": 1}
    own = [own for _, own in mixed.rows]
    assert generated in (0, 1, 12) or own not in (sorted(own), sorted(own, reverse=True))


class Scripted:
    """Stands for a model that writes given texts, one after the other."""

    def __init__(self, texts):
        self.texts, self.sizes = iter(texts), []

    def write(self, starts, seed):
        self.sizes.append(len(starts))
        return [dataclasses.replace(next(self.texts), start=start) for start in starts]


def test_it_writes_until_enough_have_passed_and_counts_the_others():
    texts = [written(words(0)), written(""), written(words(0)), written(words(1), ids=[3] * 30), written(words(2))]
    writer, starts = Scripted(texts), iter([Start((5,))] * 9)
    found = collect(2, starts, writer, Filters(SETTINGS, [], HeldOut([])), SETTINGS, progress=False)
    assert found.rows == [Row("", words(0)), Row("", words(2))]
    assert found.dropped == dict.fromkeys(REASONS, 0) | {"broken": 1, "duplicate": 1, "repetitive": 1}
    assert found.attempts == len(found.rows) + sum(found.dropped.values()) == 5
    assert writer.sizes == [2, 1, 1, 1], "no more at once than are wanted still"


def test_it_gives_up_after_as_many_attempts_as_it_may(caplog):
    settings = dataclasses.replace(SETTINGS, max_attempts=3)
    texts = [written(words(0)), written(""), written(words(0))]
    filters = Filters(settings, [], HeldOut([]))
    found = collect(2, iter([Start((5,))] * 9), Scripted(texts), filters, settings, progress=False)
    assert (len(found.rows), found.attempts) == (1, 3)
    assert "only 1 of 2 texts passed, of 3 written (dropped: broken 1, duplicate 1)" in caplog.text
    with pytest.raises(CalibrationError, match=r"none of 3 texts passed \(dropped: broken 3\)"):
        collect(2, iter([Start((5,))] * 9), Scripted([written("")] * 3), filters, settings, progress=False)


def test_fewer_written_rows_leave_the_share_as_it_is(speaker, caplog):
    settings = dataclasses.replace(SETTINGS, max_attempts=4)
    real = [Row(**tiny.row(i)) for i in range(30)]
    mixed = mixed_rows(*speaker, Mix(20, 0.5, real=real), settings, progress=False)
    own = [own for _, own in mixed.rows]
    assert own.count(True) == own.count(False) == len(mixed.written.rows) <= 4
    assert "of 10 texts passed, of 4 written" in caplog.text


def test_nothing_held_out_is_in_it(speaker):
    """What the model writes once is held out the second time; so are rows and prompts."""
    rows = [Row(words(i), f" {words(100 + i, 5)}") for i in range(8)]
    mix = Mix(8, 0.5, prompts=rows, real=rows)
    first = mixed_rows(*speaker, mix, SETTINGS, progress=False)
    assert {row.prompt for row, _ in first.rows} & {row.prompt for row in rows[:3]}
    again = mixed_rows(*speaker, dataclasses.replace(mix, held_out=rows[:3]), SETTINGS, progress=False)
    assert not {row.prompt for row, _ in again.rows} & {row.prompt for row in rows[:3]}
    assert (again.prompts_dropped, again.real_dropped["held_out"]) == (3, 3)
    assert again.written.dropped["held_out"] == 0, "no text is written for a prompt that is held out"

    free = mixed_rows(*speaker, Mix(4), SETTINGS, progress=False)
    own = [row for row, _ in free.rows]
    third = mixed_rows(*speaker, Mix(4, held_out=own[:2]), SETTINGS, progress=False)
    assert third.written.dropped["held_out"] == 2
    assert not {row for row, _ in third.rows} & set(own[:2])


@pytest.mark.parametrize(
    ("mix", "error"),
    [
        ({"rows": 0}, "rows=0 is not allowed"),
        ({"rows": 4, "share": 1.5}, "share=1.5 is not allowed: it must be a number in"),
        ({"rows": 4, "share": 0.5}, "share=0.5 is not allowed without real rows"),
    ],
)
def test_mixes_that_cannot_be_are_refused(mix, error):
    with pytest.raises(ConfigError, match=error):
        Mix(**mix)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"tokens": 0}, {"greedy_tokens": -1}, {"temperature": 0.0}, {"temperature": float("nan")}),
        *({"top_p": 0.0}, {"top_p": 1.1}, {"batch_size": 0}, {"max_attempts": 0}, {"seed": -1}, {"tokens": 1.5}),
    ],
)
def test_settings_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name}=.* is not allowed"):
        WritingSettings(**wrong)


def test_what_leaves_no_room_is_an_error(model, tokenizer):
    draw = random.Random(0)
    with pytest.raises(ConfigError, match="tokens=256 is not allowed: the model's context has 256"):
        starts_for(model, tokenizer, None, 256, draw)
    assert next(starts_for(model, tokenizer, None, 255, draw)).ids
    with pytest.raises(CalibrationError, match="none of 1 prompts can be used"):
        starts_for(model, tokenizer, [Row(**tiny.row(0))], 250, draw)
    with pytest.raises(CalibrationError, match="3 real rows are asked for, and there are 2 "):
        mixed_rows(model, tokenizer, Mix(3, 0.0, real=[Row("", "a"), Row("", "b"), Row("", "B")]), SETTINGS)
