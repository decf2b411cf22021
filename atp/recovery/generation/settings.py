"""`WritingSettings`: how a model writes its own calibration texts, checked where it enters."""

import math
from dataclasses import dataclass

from atp.checks import require


@dataclass(frozen=True)
class WritingSettings:
    """How texts are written and which are kept.

    Attributes:
        tokens: that the model writes of a text at most; it ends earlier where the model ends it.
        greedy_tokens: of them the first ones, which are the likeliest; LLM-QAT (arXiv 2305.17888) takes 3 to 5 after a
            random first token.
        temperature, top_p: of sampling the others; `top_p=1.0` samples from all tokens.
        languages: ISO 639 codes; texts in others are dropped. Empty keeps all.
        batch_size: texts written at once.
        max_attempts: give up after as many texts.
        seed: of everything drawn.
    """

    tokens: int = 256
    greedy_tokens: int = 4
    temperature: float = 1.0
    top_p: float = 0.95
    languages: tuple[str, ...] = ()
    batch_size: int = 8
    max_attempts: int = 2560
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 1, "greedy_tokens": 0, "batch_size": 1, "max_attempts": 1, "seed": 0}.items():
            value = getattr(self, name)
            require(self, name, type(value) is int and value >= least, f"an integer >= {least}")
        require(self, "temperature", 0 < self.temperature < math.inf, "a number > 0")
        require(self, "top_p", 0 < self.top_p <= 1, "a number in (0, 1]")
