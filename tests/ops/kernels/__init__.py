"""Kernels in Triton's interpreter, which has to be asked for before triton is imported: `make test` does.

Not covered here: bfloat16, of which the interpreter multiplies bit patterns.
"""

import os

import pytest

in_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs under TRITON_INTERPRET=1, as in `make test`"
)
