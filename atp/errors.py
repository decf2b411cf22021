"""Every error that a user can cause. Each says in one line what is wrong, where, and what to do.

The command line turns any of these into exit status 2 and that one line.
"""


def in_one_line(error: BaseException, at_most: int = 200) -> str:
    """What an error of a library says, on one line of so many characters; its type where it says nothing.

    What is longer ends with a whole word, so that nobody takes half a path for one.
    """
    text = " ".join(str(error).split())
    if len(text) > at_most:
        text = (text[: at_most - 4].rpartition(" ")[0] or text[: at_most - 4]) + " ..."
    return text or type(error).__name__


class ATPError(ValueError):
    """Base of all errors this package raises on purpose."""


class ConfigError(ATPError):
    """A setting is unknown, of the wrong type, or outside its range."""


class ModelError(ATPError):
    """A model or tokenizer cannot be loaded."""


class UnsupportedModelError(ATPError):
    """The model has a structure that cannot be pruned; the message names the module and why."""


class BudgetError(ATPError):
    """The asked sparsity cannot be reached in this space."""


class CalibrationError(ATPError):
    """Calibration data are missing, too few, unusable, or shared with the evaluation set."""


class DataError(ATPError):
    """A data file or data set is missing, malformed, empty, or shares rows with another."""


class CheckpointError(ATPError):
    """Saved state is missing, truncated, or belongs to another configuration."""


class DivergedError(ATPError):
    """The loss or a gradient is no longer finite."""
