"""After the decision: what is left is made to compute what the dense tuned model computes, and measured honestly."""

from atp.recovery.diagnostics import Quality
from atp.recovery.recovering import Outcome, Texts, recover
from atp.recovery.settings import METHODS, RecoverySettings

__all__ = ["METHODS", "Outcome", "Quality", "RecoverySettings", "Texts", "recover"]
