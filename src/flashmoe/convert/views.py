"""Matrices that a checkpoint stores in another order than the bundle wants: transposed blocks, alternating rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashmoe.checkpoint import AffineRows, CodedMatrix, Matrix, Run
from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.matrices import ScaleType
from flashmoe.checkpoint.tensors import TensorRef


def ordered(stored: Matrix, cols: int, turned: int, woven: int) -> Matrix:
    """The stored matrix with its blocks turned and its rows unwoven, as models.spec.Order says."""
    if turned:
        stored = TransposedMatrix(stored, turned, stored.rows // turned * stored.cols, cols)
    if not woven:
        return stored
    return UnwovenCodes(stored, woven) if isinstance(stored, CodedMatrix) else UnwovenMatrix(stored, woven)


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


@dataclass(frozen=True)
class UnwovenMatrix(Matrix):
    """A matrix whose rows alternate in blocks of ``block_rows``: here the even ones of a block come first."""

    stored: Matrix
    block_rows: int

    @property
    def rows(self) -> int:  # type: ignore[override]
        """As many as are stored."""
        return self.stored.rows

    @property
    def cols(self) -> int:  # type: ignore[override]
        """As many as are stored."""
        return self.stored.cols

    @property
    def form(self) -> str:
        """The stored one's."""
        return self.stored.form

    @property
    def fit(self) -> tuple[int, int] | None:
        """The stored one's."""
        return self.stored.fit

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError when a value is NaN or infinite."""
        spans = _spans(runs, self.block_rows // 2)
        return np.concatenate([self.stored.read_values([span])[::2] for span in spans])

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.stored.refs()


@dataclass(frozen=True)
class UnwovenCodes(CodedMatrix):
    """The same of a matrix whose codes can be kept."""

    stored: CodedMatrix
    block_rows: int

    @property
    def rows(self) -> int:  # type: ignore[override]
        """As many as are stored."""
        return self.stored.rows

    @property
    def cols(self) -> int:  # type: ignore[override]
        """As many as are stored."""
        return self.stored.cols

    @property
    def bits(self) -> int:  # type: ignore[override]
        """The stored one's."""
        return self.stored.bits

    @property
    def group(self) -> int:  # type: ignore[override]
        """The stored one's."""
        return self.stored.group

    @property
    def form(self) -> str:
        """The stored one's."""
        return self.stored.form

    @property
    def scale_type(self) -> ScaleType:
        """The stored one's."""
        return self.stored.scale_type

    @property
    def rounded(self) -> bool:
        """The stored one's."""
        return self.stored.rounded

    @property
    def table(self) -> tuple[int, ...] | None:
        """The stored one's."""
        return self.stored.table

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``."""
        return _every_other([self.stored.read([span]) for span in _spans(runs, self.block_rows // 2)])

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        """The same with places in the table."""
        return _every_other([self.stored.read_entries([span]) for span in _spans(runs, self.block_rows // 2)])

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.stored.refs()


def _spans(runs: Sequence[Run], half: int) -> Iterator[Run]:
    """The stored rows from the first to the last of neighbours here; every other one of them is wanted."""
    for start, count in runs:
        while count:
            block, row = divmod(start, half)
            n = min(count, half - row)
            yield block // 2 * 2 * half + 2 * row + block % 2, 2 * n - 1
            start, count = start + n, count - n


def _every_other(parts: Sequence[AffineRows]) -> AffineRows:
    return AffineRows(
        *(np.concatenate([array[::2] for array in arrays]) for arrays in zip(*parts, strict=True))
    )
