"""atp: all-in-one LoRA tuning and structural pruning for Hugging Face causal language models."""

from atp.callback import ATPCallback
from atp.config import ATPConfig
from atp.export import export
from atp.loading import load
from atp.structure.discovery import discover

__version__ = "0.1.0"

__all__ = ["ATPCallback", "ATPConfig", "discover", "export", "load"]
