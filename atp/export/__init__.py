"""Removing what was pruned: compaction, exported folders, and loading them again."""

from atp.export.folder import export
from atp.export.loading import load
from atp.export.registration import register

__all__ = ["export", "load", "register"]

register()
