"""Which language a text is in, as py3langid says (extra `language`): 139 languages, no network, about a ms a text."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from atp.errors import ConfigError


def language_test(languages: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is most likely in one of `languages`, ISO 639 codes such as `en`; none: no text is.

    Raises:
        ConfigError: where a code is unknown or py3langid not installed.
    """
    if not languages:
        return lambda _: False
    if importlib.util.find_spec("py3langid") is None:
        raise ConfigError("the language filter needs py3langid: pip install 'atp[language]', or give --language none")
    identifier = _identifier()
    known = sorted(map(str, identifier.labels))
    if unknown := [code for code in languages if code not in known]:
        raise ConfigError(f"languages={unknown[0]!r} is not allowed: it must be none, or of {', '.join(known)}")
    return lambda text: str(identifier.classify(text)[0]) in languages


@functools.cache
def _identifier() -> Any:
    """One of our own, for the package's functions share a global one, whose languages others may have set."""
    langid = importlib.import_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
