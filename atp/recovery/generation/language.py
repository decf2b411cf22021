"""Which language a text is in, as py3langid says (extra `language`): 139 languages, no network, 3 ms a text.

Code, tables and lists of names are in no language, and none is likely: of 450 medical abstracts' first 15 words 449 are
English with more than half of the probability, of a Python function none.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from atp.errors import ConfigError

_MORE_LIKELY_THAN_NOT = 0.5


def language_test(languages: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is more likely than not in one of `languages`, ISO 639 codes such as `en`; none: no text is.

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
        raise ConfigError(f"language {unknown[0]!r} is not known: give none, or some of {', '.join(known)}")
    return lambda text: sum(float(p) for code, p in identifier.rank(text) if code in languages) > _MORE_LIKELY_THAN_NOT


@functools.cache
def _identifier() -> Any:
    """One of our own, for the package's functions share a global one, whose languages others may have set."""
    langid = importlib.import_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
