"""Named strategies of when and by what to prune -> the `ATPConfig` of a run, so that only the decision differs.

| name | meaning |
|---|---|
| `dense` | plain LoRA, nothing pruned |
| `atp` | the recipe's own `atp` section |
| `logits` | as `atp`, with one free logit per group instead of the generator network (a control) |
| `paper` | the settings of ATP (arXiv 2412.14426) as they are |
| `prune-then-tune:CRITERION` | a formula decides on the pretrained weights, LoRA heals what is left |
| `tune-prune-recover:CRITERION` | the formula decides on half-tuned weights |
| `tune-then-prune:CRITERION` | the formula decides on the tuned weights, nothing heals |

CRITERION is one of `atp.config.CRITERIA`. `CRITERION/RANKING` takes another ranking than the criterion's own,
`CRITERION+COMPENSATION` another compensation, and `CRITERION/RANKING+COMPENSATION` both.
"""

import dataclasses
import difflib
from typing import Any

from atp.config import COMPENSATIONS, CRITERIA, GLOBAL_RANKING, RANKINGS, ATPConfig
from atp.errors import ConfigError

DENSE = "dense"
ONE_STAGE = ("atp", "logits", "paper")

FREEZE_AT = {"prune-then-tune": 0.0, "tune-prune-recover": 0.5, "tune-then-prune": 1.0}
"""The two-stage timings: the share of training after which the formula decides."""

_AS_THEY_ARE = {"init_tilt": 0.0, "init_attention": 0.0, "init_floor": 0.0, "init_trials": 0}
_UNIFORM = {"init_ranking": "block", "compensate": "none", **_AS_THEY_ARE}

CRITERION_SETTINGS: dict[str, dict[str, Any]] = {
    # Ranked inside each block, first and last blocks whole (`protect` at its default): LLM-Pruner (arXiv 2305.11627)
    # prunes every block by the same share and spares the first four and the last two of 32; Wanda (arXiv 2306.11695)
    # compares inside one layer only. Ranked globally the same scores empty whole blocks: 1451 against 45 perplexity
    # for `activation` on SmolLM2-135M at 40 %. None of these compensates for what is removed.
    "magnitude": _UNIFORM,
    "activation": _UNIFORM,
    "taylor": _UNIFORM,
    "taylor2": _UNIFORM,
    "random": _UNIFORM,
    # FLAP (arXiv 2312.11983) standardises features' scores inside each layer, ranks their means over the whole model,
    # and puts the mean of what is lost into a bias. Its authors leave no block whole; here the first and the last are
    # (`protect` at its default), which is better on SmolLM2-135M.
    "flap": {"init_ranking": "standard", "compensate": "bias", **_AS_THEY_ARE},
}
"""What each criterion changes, as its authors run it; one that is not here, ours, see `_OURS`."""

_SHARED = (
    "sparsity",
    "space",
    "uniform",
    "round_to",
    "seed",
    "calibration_rows",
    "refit_rows",
    "refit_first_tokens",
    "reader_rounds",
    "calibration_batch_size",
    "impl",
)
"""What every strategy takes from the recipe: the task, not the way to solve it."""

_OURS = ("init_ranking", *GLOBAL_RANKING, "protect")
"""What a criterion without authors takes from a recipe that starts from it, where it is chosen for the model."""


def timing_of(strategy: str) -> str:
    """The two-stage timing of a strategy, `dense`, or `one stage`."""
    timing = strategy.partition(":")[0]
    if timing in FREEZE_AT:
        return timing
    return DENSE if strategy == DENSE else "one stage"


def method_of(strategy: str) -> str:
    """What decides: what a two-stage strategy's name says after the timing, or another's own name."""
    return strategy.partition(":")[2] or strategy


def is_two_stage(strategy: str) -> bool:
    """Whether a formula decides at one moment of the run: the rivals."""
    return timing_of(strategy) in FREEZE_AT


def known_strategies() -> list[str]:
    """Every name, without the forms that choose a ranking."""
    return [DENSE, *ONE_STAGE, *(f"{timing}:{criterion}" for timing in FREEZE_AT for criterion in CRITERIA)]


def strategy_config(strategy: str, base: ATPConfig) -> ATPConfig | None:
    """The settings of a run by `strategy`, or `None` for `dense`.

    Args:
        base: the recipe's settings. Rivals take only the task from it: sparsity, space, seed, calibration rows; our own
            criterion, where the recipe starts from it, also how it ranks.

    Raises:
        ConfigError: on an unknown name, naming the nearest.
    """
    if strategy == DENSE:
        return None
    if strategy == "atp":
        return base
    if strategy == "logits":
        return dataclasses.replace(base, decision="logits")
    shared = {name: getattr(base, name) for name in _SHARED}
    if strategy == "paper":
        return ATPConfig.paper(**shared)
    timing, criterion, named = _parse(strategy)
    changes = {"decision": "criterion", "init": criterion, "freeze_at": FREEZE_AT[timing]}
    ours = {name: getattr(base, name) for name in _OURS} if base.init == criterion else {}
    own = CRITERION_SETTINGS.get(criterion, ours)
    return ATPConfig(**(shared | changes | own | named))


def _parse(strategy: str) -> tuple[str, str, dict[str, str]]:
    """Timing, criterion, and the settings named in place of the criterion's own."""
    rest, plus, compensation = strategy.partition("+")
    name, slash, ranking = rest.partition("/")
    timing, _, criterion = name.partition(":")
    if timing not in FREEZE_AT or criterion not in CRITERIA:
        near = difflib.get_close_matches(name, known_strategies(), n=1, cutoff=0.0)[0]
        raise ConfigError(f"strategy {strategy!r} is unknown: did you mean {near!r}? (see atp compare --help)")
    named = {}
    for setting, given, value, allowed in (
        ("init_ranking", slash, ranking, RANKINGS),
        ("compensate", plus, compensation, COMPENSATIONS),
    ):
        if given and value not in allowed:
            raise ConfigError(f"strategy {strategy!r}: {value!r} is unknown: use one of {', '.join(allowed)}")
        if given:
            named[setting] = value
    return timing, criterion, named
