"""atp: all-in-one LoRA tuning and structural pruning for Hugging Face causal language models.

`import atp` makes transformers know exported models, so that `AutoModelForCausalLM.from_pretrained("pruned")` opens
them. That imports torch and transformers, which takes seconds. The command `atp` must not take them where it loads no
model (`atp report`, `atp history`, `atp --help`), so in its process nothing is imported here: public names are found
when they are first asked for, and `atp.commands.models`, through which commands load models, makes them known.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ATPCallback", "ATPConfig", "discover", "export", "load", "rotate_values", "text_model"]


def _is_command() -> bool:
    """Whether this process runs `atp ...` or `python -m atp ...`."""
    program = Path(next(iter(sys.argv), "")).stem
    return (sys.orig_argv[-len(sys.argv)] if program == "-m" else program) == "atp"  # `-m`: until its module is found


if TYPE_CHECKING:
    from atp.callback import ATPCallback
    from atp.config import ATPConfig
    from atp.export import export
    from atp.loading import load
    from atp.models import text_model
    from atp.rotation import rotate_values
    from atp.structure.discovery import discover
else:
    _HOMES = {
        "ATPCallback": "atp.callback",
        "ATPConfig": "atp.config",
        "discover": "atp.structure.discovery",
        "export": "atp.export",
        "load": "atp.loading",
        "rotate_values": "atp.rotation",
        "text_model": "atp.models",
    }

    def _bind() -> None:
        """All names at once: `export` is also the name of the folder it lives in, which an import puts here."""
        for name, home in _HOMES.items():
            globals()[name] = getattr(importlib.import_module(home), name)

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _bind()
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    if not _is_command():
        _bind()
