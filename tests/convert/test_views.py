"""Matrices in another order than the bundle's: transposed blocks and alternating rows, read in any pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flashmoe.checkpoint import AffineRows, CodedMatrix, Matrix, Run
from flashmoe.convert.views import ordered, put_rows

F = np.float32
PIECES = [[(0, 24)], [(0, 1), (23, 1)], [(5, 9), (2, 3), (20, 4)], [(11, 2)]]


@dataclass(frozen=True)
class Floats(Matrix):
    """A matrix in memory."""

    values: Any
    form: str = "floats"

    @property
    def rows(self) -> int:  # type: ignore[override]
        return len(self.values)

    @property
    def cols(self) -> int:  # type: ignore[override]
        return int(self.values.shape[1])

    def read_values(self, runs: Sequence[Run]) -> np.ndarray:
        return np.concatenate([self.values[start : start + count] for start, count in runs])

    def refs(self) -> tuple[Any, ...]:
        return ()


@dataclass(frozen=True)
class Codes(Floats, CodedMatrix):
    """Codes in memory, value = 2 * code - 1, with a table that reverses them."""

    bits: int = 4
    group: int = 32
    scale_type: Any = "BF16"
    table: Any = tuple(range(15, -1, -1))

    def read(self, runs: Sequence[Run]) -> AffineRows:
        codes = super().read_values(runs)
        groups = (len(codes), self.cols // 32)
        return AffineRows(codes, np.full(groups, 2, F), np.full(groups, -1, F))

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        rows = self.read(runs)
        return rows._replace(codes=15 - rows.codes)

    def read_values(self, runs: Sequence[Run]) -> np.ndarray:
        return self.read(runs).values()


def picked(values: np.ndarray, runs: Sequence[Run]) -> np.ndarray:
    return np.concatenate([values[start : start + count] for start, count in runs])


@pytest.mark.parametrize("runs", PIECES, ids=str)
def test_turned_blocks(runs: list[Run]) -> None:
    """Three blocks of five rows and eight columns, of which four rows are wanted."""
    stored = np.random.default_rng(1).normal(size=(15, 8)).astype(F)
    wanted = stored.reshape(3, 5, 8)[:, :4].swapaxes(1, 2).reshape(24, 4)
    matrix = ordered(Floats(stored), 4, turned=5, woven=0)
    assert (matrix.rows, matrix.cols) == (24, 4)
    np.testing.assert_array_equal(matrix.read_values(runs), picked(wanted, runs))


@pytest.mark.parametrize("runs", PIECES, ids=str)
def test_unwoven_rows(runs: list[Run]) -> None:
    """Three blocks of eight rows: of each the even ones, then the odd ones."""
    stored = np.random.default_rng(2).integers(0, 16, (24, 64), np.uint8)
    wanted = stored.reshape(3, 4, 2, 64).swapaxes(1, 2).reshape(24, 64)
    floats = ordered(Floats(stored.astype(F)), 64, turned=0, woven=8)
    np.testing.assert_array_equal(floats.read_values(runs), picked(wanted.astype(F), runs))
    codes = ordered(Codes(stored), 64, turned=0, woven=8)
    assert isinstance(codes, CodedMatrix)
    assert (codes.bits, codes.group, codes.scale_type, codes.rounded) == (4, 32, "BF16", False)
    np.testing.assert_array_equal(codes.read(runs).codes, picked(wanted, runs))
    np.testing.assert_array_equal(codes.read_entries(runs).codes, 15 - picked(wanted, runs))
    np.testing.assert_array_equal(codes.read_values(runs), 2 * picked(wanted, runs).astype(F) - 1)
    assert codes.read_scales(runs)[0].shape == (sum(n for _, n in runs), 2)


def test_turned_and_unwoven() -> None:
    """gpt-oss: [E, H, 2I] with gate and up in turns."""
    stored = np.random.default_rng(3).normal(size=(2, 5, 6)).astype(F)
    matrix = ordered(Floats(stored.reshape(10, 6)), 5, turned=5, woven=6)
    gate_up = stored.swapaxes(1, 2)  # [E, 2I, H]
    wanted = np.concatenate([gate_up[:, 0::2], gate_up[:, 1::2]], 1).reshape(12, 5)
    np.testing.assert_array_equal(matrix.read_values([(0, 12)]), wanted)


@pytest.mark.parametrize(("turned", "woven"), [(5, 0), (0, 8), (5, 8)])
def test_putting_rows_back(turned: int, woven: int) -> None:
    """The inverse of ordered(), a few rows at a time; what a turned block has beyond the wanted rows stays."""
    stored = np.random.default_rng(4).normal(size=(15, 8) if turned else (24, 4)).astype(F)
    matrix = ordered(Floats(stored), 4, turned=turned, woven=woven)
    found = np.zeros_like(stored)
    for rows in np.split(np.random.default_rng(5).permutation(matrix.rows), [3, 11, 12]):
        put_rows(found, rows, matrix.read_values([(int(row), 1) for row in rows]), turned, woven)
    wanted = stored.copy()
    if turned:
        wanted.reshape(3, 5, 8)[:, 4:] = 0
    np.testing.assert_array_equal(found, wanted)
