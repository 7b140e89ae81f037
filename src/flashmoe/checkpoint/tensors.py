"""A tensor of a checkpoint as bytes on a drive: where it is, and reading some of its rows or columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32, half_to_f32
from flashmoe.checkpoint.gguf.types import BLOCKS
from flashmoe.checkpoint.header import DTYPE_NBYTES, TensorEntry
from flashmoe.checkpoint.pread import read_exact, read_pieces
from flashmoe.errors import CheckpointError

U8 = NDArray[np.uint8]
Run = tuple[int, int]  # (first row, number of rows), leading dimensions flattened
FLOAT_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a checkpoint: its place, its shard and the name it has there."""

    entry: TensorEntry
    shard: Path

    @property
    def where(self) -> str:
        """How messages name it: file and tensor."""
        return f"{self.shard}: tensor {self.entry.name!r}"

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row: the last dimension."""
        values = self.entry.shape[-1] if self.entry.shape else 1
        per_block, nbytes = BLOCKS.get(self.entry.dtype) or (1, DTYPE_NBYTES[self.entry.dtype])
        return values // per_block * nbytes

    def read_rows(self, runs: Sequence[Run], row_nbytes: int | None = None) -> NDArray[Any]:
        """The rows of ``runs``, in their order, raw: u8 [rows, bytes of a row]."""
        nbytes = row_nbytes or self.row_nbytes
        parts = [
            read_exact(self.shard, self.entry.offset + start * nbytes, count * nbytes, keep_cached=False)
            for start, count in runs
        ]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.reshape(-1, nbytes)

    def read_columns(self, start: int, nbytes: int) -> U8:
        """Bytes start..start + nbytes of every row: u8 [rows, nbytes]."""
        rows = self.entry.nbytes // self.row_nbytes
        if 2 * nbytes >= self.row_nbytes:  # the drive reads whole pages anyway
            whole = read_exact(self.shard, self.entry.offset, self.entry.nbytes)
            return np.ascontiguousarray(whole.reshape(rows, -1)[:, start : start + nbytes])
        offsets = range(self.entry.offset + start, self.entry.offset + self.entry.nbytes, self.row_nbytes)
        return read_pieces(self.shard, offsets, nbytes)

    def read_all(self) -> U8:
        """All its bytes, u8 [nbytes]."""
        return read_exact(self.shard, self.entry.offset, self.entry.nbytes)

    def floats(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols] of a FLOAT_TYPES tensor; raises CheckpointError on NaN or infinity."""
        return self.finite(raw_to_f32(self.read_rows(runs), self.entry.dtype))

    def finite(self, values: F32) -> F32:
        """``values``; raises CheckpointError when one is NaN or infinite."""
        if not np.isfinite(values.min(initial=0)) or not np.isfinite(values.max(initial=0)):
            raise CheckpointError(f"{self.where} holds NaN or infinity: download it again")
        return values


def raw_to_f32(raw: U8, dtype: str) -> F32:
    """float32 [rows, n] of little-endian bytes [rows, n * itemsize] of a FLOAT_TYPES type."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    return half_to_f32(raw.view("<u2").astype(np.uint16, copy=False), "f16" if dtype == "F16" else "bf16")
