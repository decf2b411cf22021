"""Self-generated data: rows that the model writes itself, filtered, and mixed with real ones."""

from atp.recovery.generation.language import language_test
from atp.recovery.generation.mixing import Mix, Mixed, mixed_rows
from atp.recovery.generation.settings import WritingSettings

__all__ = ["Mix", "Mixed", "WritingSettings", "language_test", "mixed_rows"]
