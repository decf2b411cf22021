"""What a recovery is told: the method and its numbers, checked. Defaults are the paper's (Shin et al., EMNLP 2024)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from atp.checks import positive, positive_int, require

_TRAINED = ("br", "br+gp", "br+cr", "br+gp+cr")
METHODS = ("lr", *_TRAINED, *(f"lr+{method}" for method in _TRAINED))
TRAINS = ("all", "lora")


@dataclass(frozen=True)
class RecoverySettings:
    """How blocks are made to compute what the dense tuned model's compute.

    Args:
        method: `"lr"` refits every writer (attention's and the MLP's last layer) by ridge regression, each half of a
            block by itself, in one look at the data. `"br"` trains each block towards the output of the teacher's
            block, the same input given to both, what the blocks before it make of the text. `+gp` (global propagation):
            the target is the teacher's own stream at that depth. `+cr` (cross-block): two blocks at a time,
            {0}, {0, 1}, {1, 2} ..., so that every block but the last is trained twice. `"lr+br"` and the like: a
            block is refitted when its turn comes, and trained from there, as in the paper, whose training starts from
            the weights that SparseGPT has solved for.
        train: `"all"` parameters of a block, or `"lora"`: LoRA on its linear layers, merged afterwards.
        learning_rate, epochs, batch_size: of Adam, for each block; the rate falls linearly to 0.
        lora_r: rank for `train="lora"`; its alpha is twice that.
        ridge: pull of the refit towards the weights as they are, relative to what a typical input holds.
        keep_best: a block ends as it was when its error on held-out text was least, before or after any epoch; and the
            whole model as it was before, where its perplexity there has not become better.
        seed: of the order of batches and of LoRA's first weights.

    Raises:
        ConfigError: naming the setting, its value, and what is allowed.
    """

    method: str = "br+gp"
    train: str = "all"
    learning_rate: float = 2e-4
    epochs: int = 10
    batch_size: int = 8
    lora_r: int = 16
    ridge: float = 0.3
    keep_best: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("train", self.train in TRAINS, f"one of {', '.join(TRAINS)}"),
            *((name, positive(getattr(self, name)), "a positive number") for name in ("learning_rate", "ridge")),
            *((n, positive_int(getattr(self, n)), "a positive integer") for n in ("epochs", "batch_size", "lora_r")),
            ("keep_best", isinstance(self.keep_best, bool), "true or false"),
            ("seed", type(self.seed) is int and self.seed >= 0, "an integer >= 0"),
        ):
            require(self, name, ok, allowed)

    @property
    def refits(self) -> bool:
        """Whether writers are refitted by ridge regression."""
        return "lr" in self._parts

    @property
    def trains(self) -> bool:
        """Whether blocks are trained."""
        return "br" in self._parts

    @property
    def propagates(self) -> bool:
        """Whether the teacher's own stream is the target."""
        return "gp" in self._parts

    @property
    def crosses(self) -> bool:
        """Whether two blocks are trained at a time."""
        return "cr" in self._parts

    def in_use(self) -> dict[str, Any]:
        """Plain values of what this method looks at."""
        unused = set() if self.trains else {"train", "learning_rate", "epochs", "batch_size", "lora_r"}
        unused |= set() if self.refits else {"ridge"}
        unused |= set() if self.train == "lora" else {"lora_r"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}

    @property
    def _parts(self) -> list[str]:
        return self.method.split("+")
