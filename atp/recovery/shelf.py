"""What a recovery has done so far, on the disk: an interrupted one goes on after the last window of blocks it finished.

A folder of safetensors, each file whole or absent: what blocks were at first, and what each window made of its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from atp.errors import CheckpointError
from atp.files import file_written_beside

_ABOUT = "atp"


class Shelf:
    """States of blocks, by index: tensors by name.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_original(self, block: int, state: Mapping[str, Tensor]) -> None:
        """What a block was before anything was done."""
        self._write(f"original_{block:04d}", state, {})

    def original(self, block: int) -> dict[str, Tensor]:
        """What `put_original` was given."""
        return self._read(f"original_{block:04d}")[0]

    def put_window(self, last: int, states: Mapping[int, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
        """What a window, called by its last block, has made of its blocks, and plain values about it."""
        tensors = {f"{block}:{name}": tensor for block, state in states.items() for name, tensor in state.items()}
        self._write(f"window_{last:04d}", tensors, about)

    def window(self, last: int) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]] | None:
        """What `put_window` was given; None where the window is not finished."""
        if not self._file(f"window_{last:04d}").is_file():
            return None
        tensors, about = self._read(f"window_{last:04d}")
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            block, _, name = key.partition(":")
            states.setdefault(int(block), {})[name] = tensor
        return states, about

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with file_written_beside(self._file(name)) as fresh:
            save_file(whole, fresh, {_ABOUT: json.dumps(about)})

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})[_ABOUT])
            return load_file(file), about
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): remove {self.folder} and start again") from None

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
