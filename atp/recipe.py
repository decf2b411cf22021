"""Recipes: the YAML file that `atp train` reads -> checked settings. Unknown keys and wrong types are errors.

```yaml
model: {name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {train: data/train.jsonl, validation: data/validation.jsonl}
lora: {r: 16}                    # fields of peft.LoraConfig
atp: {sparsity: 0.4}             # fields of ATPConfig, or `preset: paper`; `atp: false` tunes without pruning
training: {max_steps: 200}       # fields of transformers.TrainingArguments
output_dir: runs/mine
```
"""

import dataclasses
import os.path
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from atp.checks import number, positive, positive_int, require
from atp.config import ATPConfig, check_keys, read_yaml
from atp.errors import ATPError, ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING_DEFAULTS: dict[str, Any] = {"report_to": "none"}
TWO_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names of training arguments before and after transformers renamed them; a recipe may use either."""

_TRAINING: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        positive_int,
        "an integer >= 1",
    ),
    (("dataloader_num_workers",), lambda value: value >= 0, "an integer >= 0"),
    (("seed", "data_seed"), lambda value: 0 <= value < 2**32, "an integer in [0, 2^32)"),
    (
        ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"),
        lambda value: number(value) and value >= 0,
        "a number >= 0",
    ),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "a number in [0, 1)"),
    (("num_train_epochs",), positive, "a number above 0"),
    (("max_steps",), lambda value: value == -1 or value > 0, "an integer above 0, or -1 for num_train_epochs"),
)
"""What the Trainer itself would find out too late, or not at all: settings, what they must fit, and that in words."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model: a hub name, a folder, or a GGUF file; `gguf_file` names one inside a hub repository or folder.

    `load_in_4bit` (QLoRA's NF4, quantised twice) and `load_in_8bit` keep the base weights quantised while LoRA trains;
    what is exported is in `dtype`.
    """

    name_or_path: str
    gguf_file: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name_or_path", os.path.expanduser(self.name_or_path))
        if self.dtype not in DTYPES:
            raise ConfigError(f"model: dtype={self.dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("model: load_in_4bit and load_in_8bit exclude each other: set one of them to false")
        if self.bits and (self.gguf_file or self.name_or_path.endswith(".gguf")):
            raise ConfigError(
                f"model: a GGUF file cannot be loaded with load_in_{self.bits}bit: give the folder or hub name of the "
                "original model"
            )

    @property
    def places(self) -> tuple[Path, ...]:
        """Where it lies, if it is no hub name."""
        folder = Path(self.name_or_path)
        return (folder, folder / self.gguf_file) if self.gguf_file else (folder,)

    @property
    def bits(self) -> int | None:
        """Of a quantised base weight; None where weights stay as they are."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass(frozen=True)
class DataSettings:
    """Which rows, and how they become windows: see `atp.data.read_rows` and `atp.data.make_windows`.

    `calibration` is optional: without it `ATPCallback` holds rows of the training set out. The `*_split` settings are
    for hub data sets only. `validation_windows` measures only that many windows, spread evenly over the set.
    `tasks`, by name, are JSONL files that the tuned model is scored on (`atp.data.read_task`), `task_rows` of each.
    """

    train: str | list[str]
    validation: str | list[str] | None = None
    calibration: str | list[str] | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    calibration_split: str = "train"
    prompt: str | None = None
    completion: str | None = None
    max_length: int = 256
    packing: bool = True
    completion_only: bool = False
    validation_windows: int | None = None
    tasks: dict[str, str] = field(default_factory=dict)
    task_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("train", "validation", "calibration"):
            sources = getattr(self, name)
            each = sources if isinstance(sources, list) else [sources]
            named = bool(each) and all(isinstance(source, str) and source for source in each)
            require(self, name, named or sources is None, "a file or hub name, or a list of them")
            object.__setattr__(self, name, _at_home(sources))
        if self.max_length < 2:
            raise ConfigError(f"data: max_length={self.max_length} is not allowed: it must be an integer >= 2")
        if self.validation_windows is not None and self.validation_windows < 1:
            raise ConfigError(
                f"data: validation_windows={self.validation_windows} is not allowed: it must be an integer >= 1 or null"
            )
        if self.task_rows is not None and self.task_rows < 1:
            raise ConfigError(f"data: task_rows={self.task_rows} is not allowed: it must be an integer >= 1 or null")
        if not all(isinstance(word, str) for item in self.tasks.items() for word in item):
            raise ConfigError(f"data: tasks={self.tasks!r} is not allowed: it must map names to JSONL files")
        object.__setattr__(self, "tasks", {name: os.path.expanduser(file) for name, file in self.tasks.items()})
        if self.prompt is not None and self.completion is None:
            raise ConfigError("data: `prompt` is a template but `completion` is missing: set both")


@dataclass(frozen=True)
class Recipe:
    """One run. `lora` and `training` are arguments of `LoraConfig` and `TrainingArguments`, defaults filled in.

    Without `atp` (`None`; `false` in YAML) the run is plain LoRA. `measure_base`: the base model's cost and quality are
    measured too, before tuning, in runs of one process.
    """

    model: ModelSettings
    data: DataSettings
    output_dir: str
    atp: ATPConfig | None = field(default_factory=ATPConfig)
    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    measure_base: bool = True

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file; `overrides` are shell words such as `--atp.sparsity 0.5 --output_dir=runs/b`.

        Raises:
            ConfigError: naming the setting, what is wrong with it, and the nearest known one.
        """
        return cls.from_dict(apply_overrides(read_yaml(path), overrides))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Build from the nested mapping that a YAML file holds."""
        check_keys(values, {f.name for f in dataclasses.fields(cls)}, "recipe")
        for name in ("model", "data", "output_dir"):
            if not values.get(name):
                raise ConfigError(f"recipe: `{name}` is missing: add it")
        if not isinstance(values["output_dir"], str):
            raise ConfigError(f"recipe: output_dir={values['output_dir']!r} is not allowed: it must be a path")
        if "output_dir" in _section(values, "training"):
            raise ConfigError("training: output_dir is set at the top of the recipe: remove it here")
        return cls(
            model=ModelSettings(**_checked(ModelSettings, _section(values, "model"), "model")),
            data=DataSettings(**_checked(DataSettings, _section(values, "data"), "data")),
            output_dir=os.path.expanduser(values["output_dir"]),  # as TrainingArguments does
            atp=None if values.get("atp") is False else _atp_config(_section(values, "atp")),
            lora=LORA_DEFAULTS | _checked(LoraConfig, _section(values, "lora"), "lora"),
            training=TRAINING_DEFAULTS | _checked(TrainingArguments, _training(values), "training"),
            measure_base=_switch(values, "measure_base"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe, defaults included, as plain values that `from_dict` reads."""
        return dataclasses.asdict(self) | {"atp": self.atp.to_dict() if self.atp else False}

    def to_yaml(self) -> str:
        """The whole recipe as YAML that `from_yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def lora_config(self) -> LoraConfig:
        """The adapter's configuration; what PEFT refuses is a `ConfigError`."""
        if self.lora.get("inference_mode"):
            raise ConfigError("lora: inference_mode=True would leave nothing to train: leave it out")
        return _construct(LoraConfig, self.lora, "lora")

    def training_arguments(self) -> TrainingArguments:
        """The Trainer's arguments; what transformers refuses is a `ConfigError`. Starts the distributed state.

        `use_cpu` follows the machine unless it is set, so that one recipe with `bf16: true` runs on either.
        """
        defaults = {"output_dir": self.output_dir, "use_cpu": not torch.accelerator.is_available()}
        if self.training.get("resume_from_checkpoint") is not None:
            raise ConfigError("training: resume_from_checkpoint is not allowed: atp train --resume finds the last one")
        for names, fits, allowed in _TRAINING:
            for name in names:
                if (value := self.training.get(name)) is not None and not fits(value):
                    raise ConfigError(f"training: {name}={value} is not allowed: it must be {allowed}")
        return _construct(TrainingArguments, defaults | self.training, "training")


def apply_overrides(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """`values` with `--section.key value` or `--section.key=value` laid over; values are read as YAML."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: settings are given as --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError(f"{word}: a value is missing: give --{key} value")
            text = remaining.pop(0)
        _put(result, key.split("."), _parse(word, text))
    return result


def _parse(word: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{word}: value {text!r} is not valid YAML: quote it") from None


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            raise ConfigError(f"--{'.'.join(path)}: {section!r} is not a section: it has no settings inside")
        values = values[section]
    values[last] = value


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = {} if values.get(name) is None else values[name]
    if not isinstance(section, dict):
        raise ConfigError(f"recipe: `{name}` must be a mapping of settings, found {section!r}")
    return section


def _training(values: dict[str, Any]) -> dict[str, Any]:
    """The section `training`, renamed arguments by the name that this transformers has."""
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    names = TWO_NAMES if known.issuperset(TWO_NAMES.values()) else {new: old for old, new in TWO_NAMES.items()}
    section = _section(values, "training")
    for name, other in names.items():
        if name in section and other in section:
            raise ConfigError(f"training: {name} and {other} are two names of one setting: give one")
    return {names.get(name, name): value for name, value in section.items()}


def _switch(values: dict[str, Any], name: str) -> bool:
    value = values.get(name, True)
    if not isinstance(value, bool):
        raise ConfigError(f"recipe: {name}={value!r} is not allowed: it must be true or false")
    return value


def _atp_config(values: dict[str, Any]) -> ATPConfig:
    own = {key: value for key, value in values.items() if key in ("preset", "space")}  # which ATPConfig checks
    rest = {key: value for key, value in values.items() if key not in own}
    return ATPConfig.from_dict(own | _checked(ATPConfig, rest, "atp", missing_allowed=True))


def _checked(cls: type, values: dict[str, Any], where: str, missing_allowed: bool = False) -> dict[str, Any]:
    """`values` as arguments of the dataclass `cls`: keys known, required ones there, scalars of the right type."""
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    check_keys(values, set(known), where)
    for name, spec in known.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values and not missing_allowed:
            raise ConfigError(f"{where}: `{name}` is missing: add it")
    hints = typing.get_type_hints(cls)
    return {name: _typed(value, hints[name], f"{where}: {name}") for name, value in values.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Check scalars against a type hint; `5e-4`, a string to YAML, is a number where one is wanted, and `no` a word.

    A whole number stays one where any is wanted.
    """
    if value is False and _allows_no(hint):
        return "no"
    wanted = _scalar_types(hint)
    if wanted is None or type(value) in wanted or (float in wanted and type(value) is int):
        return value
    if float in wanted and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    names = " or ".join("null" if t is type(None) else t.__name__ for t in sorted(wanted, key=lambda t: t.__name__))
    raise ConfigError(f"{where}={value!r} is of the wrong type: it must be {names}")


def _scalar_types(hint: Any) -> set[type] | None:
    """The types that a union of plain types allows, or None for a hint too rich to check here."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = {typing.get_origin(part) or part for part in parts}
    return plain if plain <= {bool, int, float, str, list, dict, type(None)} else None


def _allows_no(hint: Any) -> bool:
    """Whether a type hint names an enumeration with the word `no`, as `save_strategy`'s does."""
    parts = (part for part in typing.get_args(hint) if isinstance(part, type) and issubclass(part, Enum))
    return any(member.value == "no" for part in parts for member in part)


def _at_home(sources: Any) -> Any:
    """Paths that begin with `~`, written out; hub names and None as they are."""
    if isinstance(sources, list):
        return [os.path.expanduser(source) for source in sources]
    return sources if sources is None else os.path.expanduser(sources)


def _construct(cls: type, arguments: dict[str, Any], where: str) -> Any:
    with refused_by_library(where, ValueError, TypeError, ImportError, OSError):
        return cls(**arguments)


@contextmanager
def refused_by_library(section: str, *errors: type[Exception]) -> Iterator[None]:
    """Within it, `errors` of PEFT or transformers are a `ConfigError` that names the recipe's section."""
    try:
        yield
    except ATPError:
        raise
    except errors as error:
        raise ConfigError(f"{section}: {error}") from None
