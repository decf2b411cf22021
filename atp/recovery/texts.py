"""The texts of a recovery: what is fitted to, what decides, what is looked at only; no window is in two of them."""

import hashlib
from dataclasses import dataclass

from torch import Tensor

from atp.errors import CalibrationError

CALIBRATION, HELD_OUT, OTHER = "calibration", "held_out", "other"


@dataclass(frozen=True, eq=False)
class Texts:
    """Windows of ids, `(windows, tokens)`, all of the same length.

    `calibration` is fitted to, `held_out` decides what is kept, `other`, of another domain, is looked at only.

    Raises:
        CalibrationError: where a window is in two of them.
    """

    calibration: Tensor
    held_out: Tensor
    other: Tensor | None = None

    def __post_init__(self) -> None:
        named = self.by_name()
        hashes = {name: {hashlib.sha256(row.numpy().tobytes()).digest() for row in ids} for name, ids in named.items()}
        for name in (HELD_OUT, OTHER):
            if shared := len(hashes[CALIBRATION] & hashes.get(name, set())):
                raise CalibrationError(
                    f"{shared} window(s) are in both the {CALIBRATION} and the {name.replace('_', '-')} text, so that "
                    "recovery would be judged by what it was fitted to: remove them from one of the two"
                )

    def by_name(self) -> dict[str, Tensor]:
        """Those that there are."""
        found = {CALIBRATION: self.calibration, HELD_OUT: self.held_out, OTHER: self.other}
        return {name: ids for name, ids in found.items() if ids is not None}
