"""A model goes on with given starts: a few tokens greedily, the others sampled (LLM-QAT, arXiv 2305.17888).

`generate` of transformers does the work. It takes what it is not told from the model's own generation settings
(sampling, penalties, lengths, forbidden tokens), so these are put aside meanwhile; which tokens end a text is kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from atp.passes import evaluating
from atp.randomness import drawn_aside
from atp.recovery.generation.settings import WritingSettings
from atp.recovery.generation.starts import Start


@dataclass(frozen=True)
class Written:
    """A start, the token ids that the model wrote after it, and in words what stands after the start's prompt."""

    start: Start
    ids: tuple[int, ...]
    text: str


class Writer:
    """A model and its tokenizer, and how they write."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: WritingSettings) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._ends = _ends(model, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else next(iter(self._ends), 0)

    @torch.no_grad()
    def write(self, starts: Sequence[Start], seed: int) -> list[Written]:
        """Go on with all of `starts` at once; the same for the same seed. Global random states stay as they are."""
        ids, attention = self._padded(starts)
        settings = self._settings
        greedy = _GreedyUntil(ids.shape[1] + settings.greedy_tokens)
        with _as_told(self._model), drawn_aside(self._model, seed):
            written = self._model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=GenerationConfig(
                    max_new_tokens=settings.tokens,
                    do_sample=True,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=0,
                    pad_token_id=self._pad,
                    eos_token_id=sorted(self._ends) or None,
                ),
                logits_processor=LogitsProcessorList([greedy]),
            )
        return [
            self._written(start, new) for start, new in zip(starts, written[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _padded(self, starts: Sequence[Start]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both (starts, tokens of the longest), padded at the left."""
        longest = max(len(start.ids) for start in starts)
        gaps = [longest - len(start.ids) for start in starts]
        ids = [[self._pad] * gap + list(start.ids) for gap, start in zip(gaps, starts, strict=True)]
        attention = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        return torch.tensor(ids, device=self._model.device), torch.tensor(attention, device=self._model.device)

    def _written(self, start: Start, new: Sequence[int]) -> Written:
        length = next((i for i, token in enumerate(new) if token in self._ends), len(new))
        ids = tuple(new[:length])
        # decoded with its prompt: some tokenizers drop the space that a text begins with
        before = len(self._decode(start.ids)) if start.prompt else 0
        text = self._decode((*start.ids, *ids))[before:]
        return Written(start, ids, text.rstrip("\N{REPLACEMENT CHARACTER}"))  # the last token may end inside a letter

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _GreedyUntil(LogitsProcessor):
    """Leaves only the likeliest token while sequences have fewer than `length` tokens."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (texts, vocabulary), all but the highest -inf."""
        if input_ids.shape[1] >= self._length:
            return scores
        likeliest = scores.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest, scores.gather(-1, likeliest))


@contextmanager
def _as_told(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and with no generation settings of its own."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: a chat model may have several."""
    own = model.generation_config.eos_token_id
    known = own if isinstance(own, list) else [own]
    return {token for token in (*known, tokenizer.eos_token_id) if token is not None}
