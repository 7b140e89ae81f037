"""A matrix whose rows or columns stand in another order in the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, Matrix, ScaleType
from flashmoe.checkpoint.tensors import Run, TensorRef

Order = NDArray[np.int64]
_GAP = 2  # rows wanted so near to each other are read in one piece: every other row is half of what is read


@dataclass(frozen=True, eq=False)
class _Orders:
    """Row r of the model is row ``row_of[r]`` of the file; likewise columns."""

    row_of: Order | None
    column_of: Order | None

    def runs(self, runs: Sequence[Run]) -> tuple[Sequence[Run], Order | None]:
        """Runs of rows of the file that hold the wanted ones, and the position of each wanted one among those read."""
        if self.row_of is None:
            return runs, None
        wanted = np.concatenate([self.row_of[start : start + count] for start, count in runs])
        rows, position = np.unique(wanted, return_inverse=True)
        begins = np.flatnonzero(np.diff(rows, prepend=-1 - _GAP) > _GAP)
        firsts, lasts = rows[begins], rows[np.append(begins[1:], len(rows)) - 1]
        counts = lasts - firsts + 1
        piece = np.searchsorted(firsts, rows, side="right") - 1
        read = rows - firsts[piece] + (np.cumsum(counts) - counts)[piece]
        stored = [(int(first), int(count)) for first, count in zip(firsts, counts, strict=True)]
        return stored, read[position.reshape(-1)]

    def columns(self, values: NDArray[Any], step: int) -> NDArray[Any]:
        """The columns in the model's order; ``values`` has one for each ``step`` columns of the matrix."""
        if self.column_of is None:
            return values
        return np.ascontiguousarray(values[:, self.column_of[::step] // step])


@dataclass(frozen=True, eq=False)
class ReorderedMatrix(Matrix):
    """Values."""

    base: Matrix
    orders: _Orders
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """That of the matrix in the file."""
        moved = isinstance(self.base, CodedMatrix)
        return f"{self.base.form} with columns out of order" if moved else self.base.form

    @property
    def fit(self) -> tuple[int, int] | None:
        """That of the matrix in the file; for codes that cannot be kept, as many bits."""
        if isinstance(self.base, CodedMatrix):
            return next(bits for bits in (2, 3, 4, 6, 8) if bits >= self.base.bits), self.base.group
        return self.base.fit

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises like the matrix in the file."""
        stored, position = self.orders.runs(runs)
        values = self.base.read_values(stored)
        picked: F32 = self.orders.columns(values if position is None else values[position], 1)
        return picked

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.base.refs()


@dataclass(frozen=True, eq=False)
class ReorderedCodes(CodedMatrix):
    """Codes; columns move by whole groups."""

    base: CodedMatrix
    orders: _Orders
    rows: int
    cols: int
    bits: int
    group: int

    @property
    def form(self) -> str:
        """That of the matrix in the file."""
        return self.base.form

    @property
    def scale_type(self) -> ScaleType:
        """That of the matrix in the file."""
        return self.base.scale_type

    @property
    def rounded(self) -> bool:
        """That of the matrix in the file."""
        return self.base.rounded

    @property
    def table(self) -> tuple[int, ...] | None:
        """That of the matrix in the file."""
        return self.base.table

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises like the matrix in the file."""
        return self._moved(self.base.read, runs)

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        """The same with places in the table."""
        return self._moved(self.base.read_entries, runs)

    def _moved(self, read: Callable[[Sequence[Run]], AffineRows], runs: Sequence[Run]) -> AffineRows:
        stored, position = self.orders.runs(runs)
        found = read(stored)
        codes, scales, biases = found if position is None else (part[position] for part in found)
        move = self.orders.columns
        return AffineRows(move(codes, 1), move(scales, self.group), move(biases, self.group))

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.base.refs()


def reordered(base: Matrix, row_of: Order | None, column_of: Order | None) -> Matrix:
    """``base`` with rows and columns in the model's order; rows that ``row_of`` leaves out are not part of it.

    Codes are kept where columns move by whole groups.
    """
    orders, rows = _Orders(row_of, column_of), base.rows if row_of is None else len(row_of)
    if isinstance(base, CodedMatrix) and _by_groups(column_of, base.group):
        return ReorderedCodes(base, orders, rows, base.cols, base.bits, base.group)
    return ReorderedMatrix(base, orders, rows, base.cols)


def _by_groups(column_of: Order | None, group: int) -> bool:
    if column_of is None:
        return True
    blocks = column_of.reshape(-1, group)
    return bool((blocks[:, 0] % group == 0).all() and (np.diff(blocks, axis=1) == 1).all())
