"""Where an exported model comes from: its base's name for readers and for the hub, and the licence the base states.

A licence is read from the base's own README.md or GGUF file, never guessed. Of a hub model whose card is not in the
local cache the hub is asked, once and for no more than seconds, unless `HF_HUB_OFFLINE` is set.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

_LICENCE_KEYS = ("license", "license_name", "license_link")
_SECONDS = 3.0


@dataclass(frozen=True)
class Origin:
    """The base model.

    Attributes:
        name: for readers; of a folder its last part, so that no card shows where somebody keeps files.
        hub_name: where it, or what it was made from, is on the hub.
        licence: the keys of a card's metadata, empty where the base states none; `licence_source` says what states it.
    """

    name: str
    hub_name: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    licence_source: str = ""

    @property
    def sentence(self) -> str:
        """What it is made from, in one sentence."""
        if self.hub_name:
            return f"Made from [{self.hub_name}](https://huggingface.co/{self.hub_name})."
        return "" if self.name == _UNKNOWN else f"Made from a local copy of `{self.name}`."


_UNKNOWN = "A language model"


def origin_of(base: str | None, gguf_file: str | None = None) -> Origin:
    """What can be found out about `base`, a hub name, a folder or a GGUF file; None where nobody knows."""
    if not base:
        return Origin(_UNKNOWN)
    path = Path(base)
    if path.suffix == ".gguf" and gguf_file is None:
        path, gguf_file = path.parent, path.name
    if not path.exists():
        return _on_the_hub(base)
    licence, source, hub_name = _stated(path / "README.md")
    if gguf_file and not licence:
        licence = _stated_in_gguf(path / gguf_file)
        source = f"`{gguf_file}`" if licence else ""
    name = Path(gguf_file).stem if gguf_file else _pruned_before(path) or path.resolve().name
    return Origin(name, hub_name, licence, source)


def _pruned_before(path: Path) -> str | None:
    """What an exported folder, often called `pruned`, was made from, by the title of its card."""
    if not (path / "README.md").is_file():
        return None
    title = re.search(r"^# (.+), [\d.]+ % pruned", (path / "README.md").read_text("utf-8", "replace"), re.M)
    return title[1] if title else None


@cache
def _on_the_hub(name: str) -> Origin:
    if name.count("/") > 1 or name[:1] in "./~":
        return Origin(Path(name).name)
    try:
        cached = try_to_load_from_cache(name, "README.md")
    except HFValidationError:  # a folder that is not there any more
        return Origin(Path(name).name)
    if isinstance(cached, str):
        licence, source, _ = _stated(Path(cached))
        return Origin(name, name, licence, source)
    if constants.HF_HUB_OFFLINE:
        return Origin(name, name)
    try:
        licence = _licence_in(model_info(name, timeout=_SECONDS).card_data or {})
    except Exception:  # no network, a private model, a name that is none: the card goes without
        licence = {}
    return Origin(name, name, licence, "its card" if licence else "")


def _licence_in(data: Any) -> dict[str, str]:
    return {key: data[key] for key in _LICENCE_KEYS if isinstance(data.get(key), str)}


def _stated(readme: Path) -> tuple[dict[str, str], str, str | None]:
    """Licence keys of a card, what to call it, and the hub name of what its model was made from."""
    if not readme.is_file():
        return {}, "", None
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # its metadata is no YAML, or no mapping
        return {}, "", None
    licence = _licence_in(data)
    base = data.get("base_model")
    name = base[0] if isinstance(base, list) and base else base
    return licence, "its card" if licence else "", name if isinstance(name, str) else None


def _stated_in_gguf(file: Path) -> dict[str, str]:
    try:
        from gguf import GGUFReader  # noqa: PLC0415  # optional
    except ImportError:
        return {}
    try:
        fields: dict[str, Any] = GGUFReader(file).fields
        found = fields["general.license"].contents()
    except (OSError, ValueError, KeyError):
        return {}
    return {"license": found.lower()} if isinstance(found, str) and found else {}
