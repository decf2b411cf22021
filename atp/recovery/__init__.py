"""After the decision, or for it: rows that the model writes itself, and what is done with them."""

from atp.recovery.language import language_test
from atp.recovery.mixing import Mix, Mixed, mixed_rows
from atp.recovery.settings import WritingSettings

__all__ = ["Mix", "Mixed", "WritingSettings", "language_test", "mixed_rows"]
