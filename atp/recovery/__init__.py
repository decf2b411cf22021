"""After the decision: what is left is made to compute what the dense tuned model computes, and measured honestly."""

from atp.recovery.diagnostics import Quality
from atp.recovery.outcome import Outcome
from atp.recovery.recovering import recover
from atp.recovery.settings import METHODS, RecoverySettings
from atp.recovery.texts import Texts

__all__ = ["METHODS", "Outcome", "Quality", "RecoverySettings", "Texts", "recover"]
