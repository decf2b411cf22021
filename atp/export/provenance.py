"""Where an exported model comes from: its base's name for readers and for the hub, and the licence the base states.

A licence is read from the base's own README.md or GGUF file, never guessed. Of a hub model whose card is not in the
local cache the card is fetched, unless `HF_HUB_OFFLINE` is set or nothing answers within seconds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, constants, hf_hub_download

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
    return Origin(Path(gguf_file).stem if gguf_file else path.resolve().name, hub_name, licence, source)


def _on_the_hub(name: str) -> Origin:
    if name.count("/") > 1 or name[:1] in "./~":
        return Origin(Path(name).name)
    offline = constants.HF_HUB_OFFLINE
    try:
        card = hf_hub_download(name, "README.md", etag_timeout=_SECONDS, local_files_only=offline)
    except Exception:  # no network, no card, a private model, a name that is none: the card goes without
        return Origin(name, name)
    licence, source, _ = _stated(Path(card))
    return Origin(name, name, licence, source)


def _stated(readme: Path) -> tuple[dict[str, str], str, str | None]:
    """Licence keys of a card, what to call it, and the hub name of what its model was made from."""
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, or one whose metadata is no YAML
        return {}, "", None
    licence = {key: str(data[key]) for key in _LICENCE_KEYS if isinstance(data.get(key), str)}
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
