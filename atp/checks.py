"""What settings are checked by, and the one line that says what is wrong."""

import math

from atp.errors import ConfigError


def require(settings: object, name: str, ok: bool, allowed: str) -> None:
    """Raise `ConfigError`, naming the setting, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name}={getattr(settings, name)!r} is not allowed: it must be {allowed}")


def number(value: object) -> bool:
    """A finite number; yes and no are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: object) -> bool:
    """A finite number above 0."""
    return number(value) and value > 0  # type: ignore[operator]


def positive_int(value: object) -> bool:
    """An integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
