"""`ATPConfig`: every setting of a run, checked where it enters, and its YAML round trip.

`ATPConfig()` holds the best measured defaults; `ATPConfig.paper()` the settings of ATP (arXiv 2412.14426).
Settings of the LoRA run itself (learning rate, batch size, ...) belong to `TrainingArguments` and `LoraConfig`.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atp.checks import number, positive, positive_int, require
from atp.errors import ConfigError

COMBINING = ("width", "hidden", "depth")
"""Spaces that may be joined by `+`."""

ALONE = ("values", "disp")
"""Those that may not."""

SPACES = (*COMBINING, *ALONE)
MODES = ("joint", "alternating")
DECISIONS = ("generator", "logits", "criterion")
CRITERIA = ("surgeon", "activation", "flap", "magnitude", "taylor", "taylor2", "random")
COMPENSATIONS = ("auto", "follow", "weights", "bias", "none")
RANKINGS = ("block", "global", "standard")
ON_ALERT = ("warn", "stop")
IMPLS = ("auto", "eager", "compact", "triton")

_LEARNING = (
    *("mode", "generator_every", "on_budget", "budget_weight", "budget_ramp", "init_scale", "logit_bias"),
    *("generator_lr", "generator_hidden_size", "generator_layers", "generator_heads"),
    *("start_at", "distill", "temperature", "temperature_end", "noise", "noise_end"),
)
"""Settings that only a decision that is learned looks at."""

GLOBAL_RANKING = ("init_tilt", "init_attention", "init_floor", "init_trials")
"""Settings that only `"global"` ranking looks at."""

_REFITTING = ("auto", "follow", "weights")


@dataclass(frozen=True)
class ATPConfig:
    """Settings of one tune-and-prune run.

    What to prune:
        sparsity: share of prunable parameters to remove, in (0, 1). Prunable are the weights of the decoder's
            linear layers; embeddings, head and norms are not counted.
        space: `"width"` (KV groups and MLP channels), `"hidden"` (residual dimensions, the same in the whole model),
            `"depth"` (attentions and MLPs as a whole; the first block stays), several of these joined by `+` or given
            as a list, `"values"` (dimensions of attention's values and MLP channels: where KV heads are too few to lose
            any; best on a model that `atp rotate` has written), or `"disp"` (per-block residual dimensions and MLP
            channels).
        uniform: give every block the same widths (each still chooses which dimensions), and let whole blocks go in
            `depth`: the result is then a plain Hugging Face folder. Not in `values` and `disp`; `hidden` is plain as it
            is.
        round_to: kept widths are multiples of this, KV groups apart; `None` takes 128 for widths from 8,192 on, 64 from
            2,048 on, 16 from 512 on, 8 from 128 on, else 1.

    How decisions are learned:
        decision: `"generator"` learns them; `"criterion"` trains densely until `freeze_at` and then takes what `init`
            says of the weights as they are by then (prune-then-tune at 0, tune-then-prune at 1); `"logits"` learns one
            free logit per group instead of a network, as a control.
        shots: with `decision="criterion"`, in how many equal steps of sparsity it decides, the first before training,
            the last at `freeze_at`, each on the weights as LoRA has tuned them by then; 1 decides at `freeze_at` only.
        mode: `"joint"` takes mask gradients from the LoRA step itself; `"alternating"` spends a pass of its own over
            calibration data (the paper's way), each process over rows of its own.
        generator_every: in either mode the generator learns at every so many-th step; others compute only what is kept.
        init: the criterion whose on-budget decision the generator starts from, or `"ones"` for nothing pruned.
        init_ranking: `"block"` ranks groups inside each block, `"global"` over the whole model by score per parameter,
            `"standard"` over the whole model by z-score inside each block and kind; `None` takes what suits `init`
            (`criteria.ranking.SUITABLE`).
        init_tilt: what `"global"` ranking makes of depth: scores count exp(-init_tilt) times in the first block,
            exp(init_tilt) times in the last, and as suits their place between; 0 takes them as they are.
        init_attention: likewise of kinds: scores of KV groups and of value dimensions count exp(init_attention) times
            (what removes MLP channels is made up for by refitted readers too, which scores know nothing of). 0.25, with
            a tilt of 0.6, gained SmolLM2-135M 0.031 and 0.020 nats at 50 % of `width`, nothing at 40 %, and lost 0.010
            at 20 %.
        init_floor: what `"global"` ranking leaves of every set of groups at least, in [0, 1], of the 1 - sparsity that
            stay on the whole: scores hold for small changes, and call blocks cheap that all but vanish. The
            generator may prune them later.
        init_trials: how many other starts `"global"` ranking tries, where weights are refitted (`compensate`) and
            training rows can be taken by number: tilt, attention and floor each a step more or less than the three
            above, judged by loss on 64 training rows after a short refit to the calibration rows. The best so far is
            gone on from, until none of its neighbours is better. 0 takes the three as they are. SmolLM2-135M at 50 % of
            `width`, seed 0: 12 find a tilt of 0.6 and attention of 0.25, which gain 0.031 nats in medical text and
            0.020 in legal; with seed 1 (medical), where these gain 0.010, and at 20 % they keep to the defaults.
            A trial takes what some 40 steps of 512 tokens take there.
        protect: how many first and last blocks the starting decision leaves whole; `None` means none for criteria
            whose scores compare over blocks (`surgeon`), else the first tenth and the last thirtieth. The generator
            may prune them later.
        start_at: share of the training steps during which nothing is pruned, at most `freeze_at` and by default half of
            it: `init` then decides on weights that have begun to know the domain.
        freeze_at: share of the training steps after which the decision is final, in [0, 1].
        compensate: what the final decision leaves stands in for what it takes: `"weights"` refits kept columns in the
            least-squares sense, each layer by itself, `"follow"` refits writers and the MLPs' readers block by
            block instead, so that the pruned stream follows the dense one, `"bias"` adds the mean of what is lost
            (FLAP's way), `"none"` does nothing, `"auto"` is `"follow"` where base weights are floating point
            and `"none"` where they are quantised. Until then what the starting decision leaves stands in likewise,
            each layer by itself.
        on_budget: project every hard decision onto the budget, not only the frozen one.
        budget_weight: lambda of the budget loss log(max(p, t)/min(p, t)).
        budget_ramp: share of the steps from `start_at` to the freeze over which the budget grows from nothing to
            `sparsity` when starting from `"ones"`.

    The generator:
        generator_lr, generator_hidden_size, generator_layers, generator_heads: its optimizer and Transformer encoder.
        temperature, temperature_end: tau of the sigmoid, linearly from the first to the second up to the freeze.
        logit_bias: b; added to every logit when starting from `"ones"`.
        noise: scale of the Gumbel noise at the first step; it falls linearly to `noise_end` at the freeze.
        init_scale: standard deviation of the starting logits when starting from a criterion.

    The LoRA side:
        distill: weight of the KL divergence to the model as it was when pruning began (nothing pruned, adapters as they
            were then), beside the task loss; nothing is distilled where pruning begins with the first step, since
            nothing has been tuned by then. Costs a dense forward pass a step, and no second model. 0 turns it off, the
            default: in short runs it gained nothing (`benchmarks/LOG.md`).
        lasso: strength of the group lasso on LoRA weights of pruned groups when it is fully grown; 0 turns it off.

    Calibration:
        calibration_rows: rows held out of the training set, at most a tenth of it, when no calibration set is given.
        refit_rows: rows that the final refit looks at: the calibration rows and, up to this number, training rows. Its
            targets are the dense model's own outputs, so that no row need be held out for it. Each costs a few forward
            passes, once.
        reader_rounds: rounds in which `compensate="follow"` refits the MLPs' readers, the last by all tokens, those
            before it by a draw. Two gained Gemma-3-270M (medical, 40 % of `width`) 0.015 nats after training.
        refit_first_tokens: one-token inputs that the final refit looks at besides, from the same rows; 0 turns it off.
        calibration_batch_size: rows per calibration pass of a process; `None` takes the Trainer's per-device batch
            size, so that backward passes over calibration rows need no more memory than a training step.

    Other:
        impl: how layers compute: `"eager"` as they always do, times the masks. `"auto"` computes plain LoRA (not
            quantised, sharded, DoRA, or with a base that is trained) and its base layer as one operation, and only what
            is kept where no gradient of a mask is asked for (once the decision is final, and between generator steps,
            on a GPU only where `on_budget` gives widths that suit it), if every pruned layer is such a one or a frozen
            linear layer; values are the same up to rounding.
            `"compact"` likewise, and is an error where not every layer is. `"triton"`: as `"auto"`, and blocks that
            are Llama's but for their attention apply masks in their norms, residual adds and SwiGLU, by Triton
            kernels; needs a GPU, and has not been timed on one.
        on_alert: what an alert does, a figure that says something is going wrong (`training.alerts`): `"warn"`, or
            `"stop"`, which saves a checkpoint besides and ends training.
        export: write `pruned/` when training ends.
        seed: of the private random streams; the global ones are never touched.
    """

    sparsity: float = 0.4
    space: str = "width"
    uniform: bool = False
    round_to: int | None = None

    decision: str = "generator"
    shots: int = 1
    mode: str = "joint"
    generator_every: int = 1
    init: str = "surgeon"
    init_ranking: str | None = None
    init_tilt: float = 0.3
    init_attention: float = 0.0
    init_floor: float = 0.6
    init_trials: int = 0
    protect: tuple[int, int] | None = None
    start_at: float | None = None
    freeze_at: float = 0.3
    compensate: str = "auto"
    on_budget: bool = True
    budget_weight: float = 5.0
    budget_ramp: float = 0.5

    generator_lr: float = 1e-3
    generator_hidden_size: int = 64
    generator_layers: int = 2
    generator_heads: int = 4
    temperature: float = 0.4
    temperature_end: float = 0.4
    logit_bias: float = 3.0
    noise: float = 0.0
    noise_end: float = 0.0
    init_scale: float = 1.0

    distill: float = 0.0
    lasso: float = 0.1

    calibration_rows: int = 64
    refit_rows: int = 256
    reader_rounds: int = 1
    refit_first_tokens: int = 1024
    calibration_batch_size: int | None = None

    impl: str = "auto"
    on_alert: str = "warn"
    export: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.protect, list):
            object.__setattr__(self, "protect", tuple(self.protect))
        if isinstance(self.space, list | tuple):
            object.__setattr__(self, "space", "+".join(str(part) for part in self.space))
        object.__setattr__(self, "space", "+".join(space_parts(self.space)))
        for check in (
            ("sparsity", number(self.sparsity) and 0 < self.sparsity < 1, "a number in (0, 1)"),
            ("decision", self.decision in DECISIONS, f"one of {', '.join(DECISIONS)}"),
            ("mode", self.mode in MODES, f"one of {', '.join(MODES)}"),
            ("init", self.init in (*CRITERIA, "ones"), f"one of {', '.join(CRITERIA)}, ones"),
            ("init_ranking", self.init_ranking in (None, *RANKINGS), f"one of {', '.join(RANKINGS)}, or null"),
            ("compensate", self.compensate in COMPENSATIONS, f"one of {', '.join(COMPENSATIONS)}"),
            ("impl", self.impl in IMPLS, f"one of {', '.join(IMPLS)}"),
            ("on_alert", self.on_alert in ON_ALERT, f"one of {', '.join(ON_ALERT)}"),
            ("round_to", self.round_to is None or positive_int(self.round_to), "a positive integer or null"),
            (
                "calibration_batch_size",
                self.calibration_batch_size is None or positive_int(self.calibration_batch_size),
                "a positive integer or null",
            ),
            ("protect", _is_protect(self.protect), "two non-negative integers or null"),
            ("freeze_at", number(self.freeze_at) and 0 <= self.freeze_at <= 1, "a number in [0, 1]"),
            (
                "start_at",
                self.start_at is None or (number(self.start_at) and 0 <= self.start_at <= self.freeze_at),
                f"a number in [0, freeze_at={self.freeze_at}] or null",
            ),
            ("init_floor", number(self.init_floor) and 0 <= self.init_floor <= 1, "a number in [0, 1]"),
            ("budget_ramp", number(self.budget_ramp) and 0 <= self.budget_ramp <= 1, "a number in [0, 1]"),
            ("temperature", positive(self.temperature), "a positive number"),
            ("temperature_end", positive(self.temperature_end), "a positive number"),
            ("generator_lr", positive(self.generator_lr), "a positive number"),
            ("init_scale", positive(self.init_scale), "a positive number"),
            ("logit_bias", number(self.logit_bias), "a number"),
            *(
                (name, number(getattr(self, name)) and abs(getattr(self, name)) <= 20, "a number in [-20, 20]")
                for name in ("init_tilt", "init_attention")
            ),
            *(
                (name, number(getattr(self, name)) and getattr(self, name) >= 0, "a number >= 0")
                for name in ("budget_weight", "distill", "lasso", "noise", "noise_end")
            ),
            *(
                (name, positive_int(getattr(self, name)), "a positive integer")
                for name in (
                    "shots",
                    "generator_every",
                    "generator_hidden_size",
                    "generator_layers",
                    "generator_heads",
                    "calibration_rows",
                    "refit_rows",
                    "reader_rounds",
                )
            ),
            *(
                (name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an integer >= 0")
                for name in ("seed", "init_trials", "refit_first_tokens")
            ),
            *(
                (name, isinstance(getattr(self, name), bool), "true or false")
                for name in ("uniform", "on_budget", "export")
            ),
        ):
            require(self, *check)
        if self.generator_hidden_size % self.generator_heads:
            raise ConfigError(
                f"generator_hidden_size={self.generator_hidden_size} is not a multiple of "
                f"generator_heads={self.generator_heads}: change one of them"
            )
        if self.decision == "criterion" and self.init == "ones":
            raise ConfigError("decision='criterion' needs a criterion in init, not 'ones': set init to activation")
        if self.uniform and self.space in ALONE:
            raise ConfigError(f"uniform=True makes nothing plain in space={self.space!r}: set uniform to false")

    @property
    def alternates(self) -> bool:
        """Whether the decision is learned in passes of its own over calibration data."""
        return self.mode == "alternating" and self.decision != "criterion"

    @property
    def distils(self) -> bool:
        """Whether the dense model teaches, once it has been tuned for a while."""
        return self.distill > 0 and self.decision != "criterion"

    @classmethod
    def paper(cls, **changes: Any) -> "ATPConfig":
        """The settings of ATP (arXiv 2412.14426): alternating, from all ones, b = 3, tau = 0.4, lambda = 5.

        Our Gumbel noise is centred and the paper's is not: its mean, 0.5772, is part of `logit_bias` here.
        """
        settings: dict[str, Any] = {
            "mode": "alternating",
            "init": "ones",
            "compensate": "none",
            "on_budget": False,
            "budget_weight": 5.0,
            "budget_ramp": 0.0,
            "logit_bias": 3.5772,
            "temperature": 0.4,
            "temperature_end": 0.4,
            "noise": 1.0,
            "noise_end": 1.0,
            "start_at": 0.0,
            "freeze_at": 0.6,
            "distill": 0.0,
        }
        return cls(**(settings | changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ATPConfig":
        """Build from plain values; an unknown key is an error that names the nearest known one.

        The key `preset: paper` starts from `ATPConfig.paper()`.
        """
        values = dict(values)
        preset = values.pop("preset", None)
        if preset not in (None, "paper"):
            raise ConfigError(f"preset={preset!r} is unknown: leave it out or use 'paper'")
        check_keys(values, {field.name for field in dataclasses.fields(cls)}, "ATPConfig")
        return cls.paper(**values) if preset else cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "ATPConfig":
        """Read a YAML mapping written by `to_yaml` or by hand."""
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def settings_in_use(self) -> dict[str, Any]:
        """`to_dict` without the settings that no run with this `decision`, `compensate` and ranking looks at."""
        unused: tuple[str, ...] = _LEARNING if self.decision == "criterion" else ("shots",)
        unused += () if self.compensate in _REFITTING else ("refit_rows", "refit_first_tokens", "init_trials")
        unused += () if self.compensate in ("follow", "auto") else ("reader_rounds",)
        unused += GLOBAL_RANKING if self.init_ranking in ("block", "standard") else ()
        return {name: value for name, value in self.to_dict().items() if name not in unused}

    def to_yaml(self, path: str | Path) -> None:
        """Write the settings as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def space_parts(space: str) -> tuple[str, ...]:
    """The spaces that `space` joins by `+`, in order.

    Raises:
        ConfigError: where there is no such space.
    """
    given = str(space).split("+")
    alone = len(given) == 1 and given[0] in ALONE
    if not (alone or set(given) <= set(COMBINING)) or len(set(given)) < len(given):
        raise ConfigError(
            f"space={space!r} is not allowed: it must be one of {', '.join(SPACES)}, or several of "
            f"{', '.join(COMBINING)} joined by +"
        )
    return tuple(part for part in SPACES if part in given)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a `ConfigError` of one line."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, found {type(values).__name__}")
    return values


class _EachKeyOnce(yaml.SafeLoader):
    """As `yaml.safe_load`, which of a key that is given twice drops the first, a whole section perhaps."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} is there twice: remove one", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_keys(values: dict[str, Any], known: set[str], where: str) -> None:
    """Raise `ConfigError` on the first key of `values` that is not in `known`, naming the nearest."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known settings: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown setting {key!r}: {hint}")


def _is_protect(value: object) -> bool:
    return value is None or (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    )
