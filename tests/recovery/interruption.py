"""A recovery that is cut while it fits its third window of blocks, and goes on when it is called again."""

from typing import Any

import pytest

from atp.recovery import recovering


def cut_at_the_third(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Raise `KeyboardInterrupt` at the third fit from now on, and there only; the list grows by one a fit."""
    fit, calls = recovering._Recovery._fit, []

    def killed(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, *args)

    monkeypatch.setattr(recovering._Recovery, "_fit", killed)
    return calls
