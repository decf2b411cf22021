"""The README.md of an exported folder: a Hugging Face model card that says what opens this very model, and its numbers.

What the folder holds is read from its `config.json` and weight files; `About` adds what only the run knows. Nothing is
made up: without a licence, data or results the card has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from atp.config import ATPConfig
from atp.export.provenance import Origin, origin_of
from atp.export.pruned import Pruned

README = "README.md"
_METHOD = "atp (all-in-one tuning and pruning, [arXiv 2412.14426](https://arxiv.org/abs/2412.14426))"
_PRUNED = f"It was pruned by {_METHOD}; what was pruned is physically gone."
_TUNED = (
    f"It was tuned and pruned at once by {_METHOD}: LoRA learned the training text while a small network learned "
    "what can go. LoRA is merged, and what was pruned is physically gone."
)
_BASE = (
    f"It was pruned by {_METHOD}. Its weights are those under the LoRA adapter that was trained with the pruning, "
    "which is not merged: load it with that adapter, or train others on it."
)


@dataclass(frozen=True)
class Result:
    """One figure of an evaluation: `metric` is called as the hub calls it (`perplexity`, `accuracy`, `loss`)."""

    dataset: str
    metric: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class About:
    """What a card can say beyond what its folder holds.

    Attributes:
        base: hub name, folder or GGUF file of the base model; `gguf_file` names one inside it.
        data: hub names or files of the training text.
        settings: of the run, as a recipe says them.
        results: of evaluations of this model.
    """

    base: str | None = None
    gguf_file: str | None = None
    data: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()


def chosen(config: ATPConfig) -> dict[str, Any]:
    """The settings of a run that differ from the defaults, after those that matter to every reader."""
    defaults, own = ATPConfig().to_dict(), config.settings_in_use()
    shown = ("sparsity", "space", "uniform")
    return {k: own[k] for k in shown} | {k: v for k, v in own.items() if k not in shown and v != defaults[k]}


def write_card(folder: Path, about: About, *, is_base: bool = False) -> None:
    """Write `folder`'s README.md.

    Args:
        is_base: whether it is a base that adapters go on.
    """
    (folder / README).write_text(f"{model_card(folder, about, is_base=is_base)}\n", encoding="utf-8")


def model_card(folder: Path, about: About, *, is_base: bool = False) -> ModelCard:
    """The card of an exported folder, see `write_card`."""
    pruned, origin = Pruned.of(folder), origin_of(about.base, about.gguf_file)
    title = f"{origin.name}, {pruned.percent} pruned" + (", a base for adapters" if is_base else "")
    intro = f"{origin.sentence} {_BASE if is_base else _TUNED if about.settings else _PRUNED}"
    sections = [f"# {title}", intro, pruned.table(), pruned.how_to_open(), *_evaluation(about), *_making(about)]
    data = _metadata(origin, about, "transformers", ["atp", "pruned"], title)
    return _card(data, [*sections, _licence(origin)])


def write_adapter_card(folder: Path, base: Path, about: About) -> None:
    """Write the README.md of a PEFT adapter in `folder`, whose pruned base lies in `base`."""
    pruned, origin = Pruned.of(base), origin_of(about.base, about.gguf_file)
    title = f"LoRA adapter on {origin.name}, {pruned.percent} pruned"
    opening = f"""## How to open it

```python
{"import atp  # or trust_remote_code=True below" if pruned.is_ragged else ""}
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("base")  # the folder beside this one
model = PeftModel.from_pretrained(base, "adapter")
```

It fits that base only, not the model that was pruned. `adapter_config.json` names the base by an absolute path, because
PEFT takes a relative one from the folder a process is started in: after moving both, load the base yourself, as above.
`model.merge_and_unload()` gives one model of them.""".replace("```python\n\n", "```python\n")
    data = _metadata(origin, about, "peft", ["atp", "lora", "pruned"], title)
    intro = "The LoRA that was trained with the pruning, cut to the size of the pruned base; the base can carry others."
    sections = [f"# {title}", intro, opening, *_evaluation(about), *_making(about), _licence(origin)]
    (folder / README).write_text(f"{_card(data, sections)}\n", encoding="utf-8")


def write_rotated_card(folder: Path, base: str, gguf_file: str | None, moved: float) -> None:
    """Write the README.md of a model with rotated values (`atp.rotation`), so that name and licence go along.

    Args:
        moved: by what share its logits have moved.
    """
    origin = origin_of(base, gguf_file)
    title = f"{origin.name}, its values rotated"
    intro = (
        f"{origin.sentence} It computes what that model does: values of every head are rotated, and attention's output "
        f"projection back, which has moved logits by {moved:.1e} of their size. To be pruned by atp in space `values`."
    )
    data = _metadata(origin, About(base), "transformers", ["atp"], title)
    (folder / README).write_text(f"{_card(data, [f'# {title}', intro, _licence(origin)])}\n", encoding="utf-8")


def _card(data: ModelCardData, sections: list[str]) -> ModelCard:
    text = "\n\n".join(section.strip() for section in sections if section.strip())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=True)


def _metadata(origin: Origin, about: About, library: str, tags: list[str], title: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_slug(result.dataset),
            dataset_name=result.dataset,
            metric_type=result.metric,
            metric_value=round(result.value, 4),
        )
        for result in about.results
    ]
    return ModelCardData(
        base_model=origin.hub_name,
        datasets=[name for name in about.data if _is_hub_name(name)] or None,
        eval_results=results or None,
        library_name=library,
        model_name=title if results else None,
        pipeline_tag="text-generation",
        tags=tags,
        license=origin.licence.get("license"),
        license_name=origin.licence.get("license_name"),
        license_link=origin.licence.get("license_link"),
    )


def _evaluation(about: About) -> list[str]:
    if not about.results:
        return []
    rows = [f"| {r.dataset} | {r.metric} | {r.value:.4g} | {r.note} |" for r in about.results]
    return ["\n".join(["## Evaluation", "", "| on | metric | value | |", "|---|---|---:|---|", *rows])]


def _making(about: About) -> list[str]:
    parts = []
    if about.data:
        parts.append(f"Training text: {', '.join(_shown(about.data))}.")
    if about.settings:
        settings = yaml.safe_dump(dict(about.settings), sort_keys=False).strip()
        parts.append(f"Settings, as a recipe of `atp train`; the others are defaults:\n\n```yaml\n{settings}\n```")
    return ["\n\n".join(["## How it was made", *parts])] if parts else []


def _licence(origin: Origin) -> str:
    name = origin.licence.get("license_name") or origin.licence.get("license")
    if name:
        return f"## Licence\n\n{name}, as {origin.licence_source} says of the model it was made from."
    return "## Licence\n\nThat of the model it was made from, whose files at hand name none: see there."


def _shown(names: Sequence[str]) -> list[str]:
    """Hub names, and files without the folders that hold them, but for one where two files have the same name."""
    files = [Path(name) for name in names if not _is_hub_name(name)]
    alike = len({file.name for file in files}) < len(files)
    return [f"`{n}`" if _is_hub_name(n) else f"`{'/'.join(Path(n).parts[-1 - alike :])}`" for n in names]


def _is_hub_name(name: str) -> bool:
    return not Path(name).suffix and not Path(name).exists() and name.count("/") <= 1 and name[:1] not in "./~"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
