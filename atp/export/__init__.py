"""Removing what was pruned: compaction, exported folders, and loading them again."""

from atp.export.adapter import export_adapter
from atp.export.card import About, Result
from atp.export.compaction import require_mergeable
from atp.export.folder import export
from atp.export.loading import load
from atp.export.registration import register

__all__ = ["About", "Result", "export", "export_adapter", "load", "register", "require_mergeable"]

register()
