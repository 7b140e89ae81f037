"""Rotary positions (Su et al., arXiv 2104.09864): which part of a head turns, how fast, and the tables of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flashmoe.nn.weights import F32


class RopeScaling(Protocol):
    """How a model that was trained on fewer positions turns more slowly.  Hashable."""

    def frequencies(self, inverse: F32) -> F32:
        """The scaled angles per position from the plain ones, float32 [rotated / 2] each."""

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""


@dataclass(frozen=True)
class Rope:
    """The pairs (i, i + rotated / 2) of a head's first `rotated` values turn by position * theta^(-2i / rotated)."""

    rotated: int
    theta: float
    scaling: RopeScaling | None = None


class RotaryTable:
    """cos and sin of every position and frequency, float32 [context, rotated // 2].

    Angles are rounded to float32 before the cosine, as the reference implementation does: at position 1,500 the
    difference to exact angles is already 1e-4.
    """

    def __init__(self, context: int, rope: Rope) -> None:
        exponents = np.arange(0, rope.rotated, 2, dtype=np.float32) / np.float32(rope.rotated)
        inverse = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
        if rope.scaling is not None:
            inverse = rope.scaling.frequencies(inverse).astype(np.float32, copy=False)
        angles = np.arange(context, dtype=np.float32)[:, None] * inverse[None, :]
        self.cos: F32 = np.cos(angles)
        self.sin: F32 = np.sin(angles)
        if rope.scaling is not None and rope.scaling.amplitude != 1.0:
            self.cos *= np.float32(rope.scaling.amplitude)
            self.sin *= np.float32(rope.scaling.amplitude)

    @staticmethod
    def nbytes_of(context: int, rotated: int) -> int:
        """Bytes of both tables."""
        return 4 * context * rotated


class RotaryTables:
    """The tables of one model: layers that turn alike share one."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._tables: dict[Rope, RotaryTable] = {}

    def of(self, rope: Rope) -> RotaryTable:
        """The table of all positions of the context."""
        if rope not in self._tables:
            self._tables[rope] = RotaryTable(self._context, rope)
        return self._tables[rope]
