"""Mean squares of the inputs of matrices, as a calibration run saw them: what an error in each column costs.

A safetensors file of F32 tensors.  Names: a matrix's own in the bundle (``layers.3.self_attn.q_proj``) [cols]; of an
FFN record ``NAME.gate_up`` [hidden] and ``NAME.down`` [intermediate]; of a layer's experts ``experts.N.gate_up`` and
``experts.N.down``, [experts, cols].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.header import TensorEntry, read_header
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import CheckpointError

_OF_EXPERT = re.compile(r"experts\.(\d+)\.(\d+)\.(gate_up|down)")


def no_importance() -> None:
    """All columns count alike."""
    return


class Importance:
    """An opened file of importances, or none.  Rows are read when they are needed; thread-safe."""

    def __init__(self, path: Path | None, tensors: Mapping[str, TensorEntry]) -> None:
        self.path, self._tensors = path, tensors

    @classmethod
    def open(cls, path: Path) -> Importance:
        """Raises CheckpointError when the file is missing, damaged or holds anything but F32."""
        header = read_header(path)
        if any(entry.dtype != "F32" or not entry.shape for entry in header.tensors.values()):
            raise CheckpointError(f"{path} holds other tensors than F32: calibrate again")
        return cls(path, header.tensors)

    @property
    def fingerprint(self) -> str | None:
        """The hash of the file, None without one."""
        return None if self.path is None else xxhash.xxh3_64_hexdigest(self.path.read_bytes())

    def reader(self, name: str, cols: int) -> Callable[[], F32 | None]:
        """Gives the importances [cols] of a matrix's input when called, None where the file does not know it.

        name: as above, an expert's with its number (``experts.3.17.down``).  Raises CheckpointError when there are
        not ``cols`` of them; the call itself ReadError, or CheckpointError when one is negative or not finite.
        """
        expert = _OF_EXPERT.fullmatch(name)
        key = f"experts.{expert[1]}.{expert[3]}" if expert else name
        entry = self._tensors.get(key)
        if entry is None or self.path is None:
            return no_importance
        row = int(expert[2]) if expert else 0
        if entry.shape[-1] != cols or (expert and not row < entry.shape[0]):
            raise CheckpointError(
                f"{self.path}: {key} has the shape {list(entry.shape)}, the model wants {cols} columns: calibrate again"
            )
        return partial(_read, self.path, key, entry.offset + 4 * cols * row, cols)


NO_IMPORTANCE = Importance(None, {})


def _read(path: Path, key: str, offset: int, cols: int) -> F32:
    values = read_exact(path, offset, 4 * cols).view("<f4").astype(np.float32, copy=False)
    if not np.isfinite(values).all() or (values < 0).any():
        raise CheckpointError(f"{path}: {key} is no mean of squares: calibrate again")
    return values
