"""What a recovery did, block by block and on the whole."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from atp.recovery.diagnostics import Error, Quality


@dataclass(frozen=True)
class BlockOutcome:
    """Of one block: errors of the stream after it, by text, without recovery and with; and what it took."""

    block: int
    before: dict[str, Error]
    after: dict[str, Error]
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """`before`, `after`: of the whole model, by text; `kept`: whether the model is now what recovery made of it.

    Where it is not, `after`, and that of blocks, say what was tried.
    """

    blocks: tuple[BlockOutcome, ...]
    before: dict[str, Quality]
    after: dict[str, Quality]
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `blocks`, and `overall`."""
        plain = dataclasses.asdict(self)
        return {"blocks": list(plain.pop("blocks")), "overall": plain}
