"""Applying a decision: masked linear layers, put in place and taken out again."""

from atp.layers.attachment import Attachment, attach, attachment_of, detach
from atp.layers.masked import base_changed

__all__ = ["Attachment", "attach", "attachment_of", "base_changed", "detach"]
