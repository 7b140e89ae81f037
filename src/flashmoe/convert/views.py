"""Matrices that a checkpoint stores in another order than the bundle wants: transposed blocks, alternating rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint import Matrix, Run
from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.reordered import reordered
from flashmoe.checkpoint.tensors import TensorRef


def ordered(stored: Matrix, cols: int, turned: int, woven: int) -> Matrix:
    """The stored matrix with its blocks turned and its rows unwoven, as models.spec.Order says."""
    if turned:
        stored = TransposedMatrix(stored, turned, stored.rows // turned * stored.cols, cols)
    return reordered(stored, _woven_rows(np.arange(stored.rows), woven), None) if woven else stored


def put_rows(stored: F32, rows: NDArray[np.int64], values: F32, turned: int, woven: int) -> None:
    """The inverse of ordered(): write ``values``, its rows numbered ``rows``, to where ``stored`` has them."""
    if woven:
        rows = _woven_rows(rows, woven)
    if not turned:
        stored[rows] = values
        return
    blocks, columns = np.divmod(rows, stored.shape[1])
    for block in np.unique(blocks):
        mine, first = blocks == block, block * turned
        stored[first : first + values.shape[1], columns[mine]] = values[mine].T


def _woven_rows(rows: NDArray[np.int64], woven: int) -> NDArray[np.int64]:
    """Where rows lie that come first of the even, then of the odd ones of each so many."""
    block, within = np.divmod(rows, woven)
    odd, pair = np.divmod(within, woven // 2)
    stored: NDArray[np.int64] = block * woven + 2 * pair + odd
    return stored


@dataclass(frozen=True)
class TransposedMatrix(Matrix):
    """Blocks of ``block_rows`` rows of a stored matrix, each turned: its columns are this matrix's rows.

    The first ``cols`` rows of a block become columns.  Keeps one block in memory.  Not thread-safe.
    """

    stored: Matrix
    block_rows: int
    rows: int
    cols: int
    _held: dict[int, F32] = field(default_factory=dict, compare=False)

    @property
    def form(self) -> str:
        """The stored one's: turned codes have no groups any more, their values are what is left."""
        return self.stored.form

    @property
    def fit(self) -> tuple[int, int] | None:
        """As the stored one: eight bits for values of codes that four bits would not hold."""
        return self.stored.fit

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError when a value is NaN or infinite."""
        parts = []
        for start, count in runs:
            while count:
                block, row = divmod(start, self.stored.cols)
                part = self._block(block)[row : row + count]
                parts.append(part)
                start, count = start + len(part), count - len(part)
        return np.ascontiguousarray(np.concatenate(parts))

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.stored.refs()

    def _block(self, index: int) -> F32:
        if index not in self._held:
            self._held.clear()  # never two blocks at a time: one of gpt-oss's is 66 MB
            self._held[index] = self.stored.read_values([(index * self.block_rows, self.cols)]).T
        return self._held[index]
