"""The code on a device that is not the CPU, where there is no GPU: what CUDA refuses is refused here too."""

import importlib
import os
from typing import Any

import pytest
from torch.utils import backend_registration

_ASKED = os.environ.get("ATP_SECOND_DEVICE") == "1" and hasattr(
    backend_registration, "_setup_privateuseone_for_python_backend"
)
in_its_own_process = pytest.mark.skipif(
    not _ASKED, reason="runs under ATP_SECOND_DEVICE=1, as in `make test`, where PyTorch takes devices made in Python"
)

second: Any = None
if _ASKED:  # before the first backward pass, when PyTorch counts its devices
    second = importlib.import_module("tests.device.second")
