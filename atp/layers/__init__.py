"""Applying a decision: masked linear layers, put in place and taken out again."""

from atp.layers.attachment import Attachment, attach, attachment_of, detach

__all__ = ["Attachment", "attach", "attachment_of", "detach"]
