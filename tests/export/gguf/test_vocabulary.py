"""What llama.cpp's tokenizer makes of texts, and which tokenizers are refused.

Oracle: the Hugging Face tokenizer of the same folder.
"""

import random

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atp.errors import UnsupportedModelError
from atp.export.gguf import write_gguf
from atp.export.gguf.special import fitting_name
from atp.export.gguf.vocabulary import _CL100K, _O200K, _ONE_DIGIT, _TEKKEN
from tests import families
from tests.export.gguf.llama_cpp import LlamaCpp
from tests.families import _family

WORDS = (
    "the of and Fever renal 12 3.5 2026 , . ( ) - é ß 漢字 😀 \n \t \r\n A'S it's we'LL camelCase HTTPServer // x[1]=2;"
    " </s> <extra> banana ananas nab aaaab bbaab abab"  # the last can be joined in many ways
)
SIZE = 640


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = WORDS.split(" ")
    made = ["".join(rng.choice(["", " ", " ", "  "]) + rng.choice(words) for _ in range(20)) for _ in range(count)]
    return ["", " ", "Hello world", "  two\n\n\nlines  ", *made]


def trained(pre_tokenizer, normalizer=None, ignore_merges=False, **model) -> Tokenizer:
    """BPE of fewer than `SIZE` tokens over `texts`."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges, **model))
    core.pre_tokenizer, core.normalizer = pre_tokenizer, normalizer
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 8,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=[] if byte_tokens else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(300), trainer)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken("<extra>", normalized=False)])
    return core


def steps(*parts):
    return pre_tokenizers.Sequence(list(parts))


def split(expression, behavior="isolated", invert=False):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return steps(pre_tokenizers.Split(Regex(expression), behavior, invert), bytes_only)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
LEVELS = {
    "gpt-2": lambda: trained(GPT2, normalizers.NFC()),
    "smollm": lambda: trained(steps(pre_tokenizers.Digits(individual_digits=True), GPT2)),
    "llama-bpe": lambda: trained(split(_CL100K), ignore_merges=True),
    "dbrx": lambda: trained(split(_CL100K, "removed", invert=True)),
    "qwen2": lambda: trained(split(_ONE_DIGIT), normalizers.NFC()),
    "gpt-4o": lambda: trained(split(_O200K)),
    "tekken": lambda: trained(split(_TEKKEN), ignore_merges=True),
}
REPLACE = normalizers.Replace(" ", "▁")
CHARACTERS = {
    "llama": (None, normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])),
    "metaspace": (pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False), None),
    "gemma": (pre_tokenizers.Split(" ", "merged_with_previous"), REPLACE),
}


def written(core: Tokenizer, path, bos: bool = True, rows: int = SIZE, **changes):
    """A tiny model's file with this tokenizer, and the tokenizer."""
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **changes
    )
    families.from_config(_family("Llama", vocab_size=rows)()).save_pretrained(path)
    wrapped.save_pretrained(path)
    return write_gguf(path, path / "m.gguf", "f32"), wrapped


def value(file, key):
    return gguf.GGUFReader(file).get_field(key).contents()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", LEVELS)
def test_byte_level(name, bos, tmp_path):
    file, wrapped = written(LEVELS[name](), tmp_path, bos)
    assert value(file, "tokenizer.ggml.pre") == name
    llama_cpp = LlamaCpp(file, SIZE)
    for text in texts(40):
        assert llama_cpp.tokenize(text) == wrapped(text)["input_ids"], text


@pytest.mark.parametrize("name", CHARACTERS)
def test_characters_with_byte_fallback(name, tmp_path):
    pre_tokenizer, normalizer = CHARACTERS[name]
    core = trained(pre_tokenizer, normalizer, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    file, wrapped = written(core, tmp_path)
    assert value(file, "tokenizer.ggml.model") == "llama"
    llama_cpp = LlamaCpp(file, SIZE)
    for text in (text for text in texts(40) if "<" not in text and not (name == "metaspace" and text[:1] == " ")):
        assert llama_cpp.tokenize(text) == wrapped(text)["input_ids"], text


def test_special_tokens_and_template(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file, _ = written(LEVELS["gpt-2"](), tmp_path, chat_template=template)
    assert value(file, "tokenizer.chat_template") == template
    assert (value(file, "tokenizer.ggml.bos_token_id"), value(file, "tokenizer.ggml.eos_token_id")) == (1, 2)
    assert value(file, "tokenizer.ggml.add_bos_token") is True
    assert value(file, "tokenizer.ggml.add_eos_token") is False
    tokens, types = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert len(tokens) == SIZE == len(types)
    assert types[1] == gguf.TokenType.CONTROL
    assert types[tokens.index("<extra>")] == gguf.TokenType.USER_DEFINED
    assert types[-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize(
    ("core", "words"),
    [
        (lambda: trained(split(r"\w+")), "how this tokenizer splits"),
        (lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "does not split"),
        (lambda: trained(GPT2, normalizers.Lowercase()), "no normaliser Lowercase"),
        (lambda: Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")), "WordLevel"),
    ],
)
def test_what_llama_cpp_cannot_tokenize_is_refused(core, words, tmp_path):
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        written(core(), tmp_path, bos=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_more_tokens_than_rows_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="embedding 100 rows"):
        written(LEVELS["gpt-2"](), tmp_path, rows=100)


def test_a_name_that_means_something_to_llama_cpp(tmp_path):
    folder = tmp_path / "my-phi3-model"
    file, _ = written(LEVELS["gpt-2"](), folder)
    assert "phi3" not in value(file, "general.name").lower()
    assert LlamaCpp(file, SIZE).tokenize("a")  # it would not open
    core = LEVELS["gpt-2"]()
    core.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|user|>", rstrip=True)])
    core.save(str(folder / "tokenizer.json"))
    assert fitting_name("Clinical", folder) == "Clinical (Phi3)"
