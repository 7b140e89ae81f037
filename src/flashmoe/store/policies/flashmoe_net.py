"""The network of "FlashMoE: Reducing SSD I/O Bottlenecks via ML-Based Cache Replacement" (arXiv 2601.17063)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.store.policies.scored import Scored

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class NetworkWeights:
    """L layers of E experts, h hidden units (64 as published); all float32.

    For each layer: distances = abs(silu(silu(x @ w1 + b1) @ w2 + b2) @ w3 + b3), x = [recency | frequency].
    """

    layers: tuple[int, ...]
    w1: F32  # [L, 2 E, h]
    b1: F32  # [L, h]
    w2: F32  # [L, h, h]
    b2: F32  # [L, h]
    w3: F32  # [L, h, E]
    b3: F32  # [L, E]


class FlashMoeNet(Scored):
    """Evicts whoever is predicted to be needed last.

    recency = 1 / (events since the last use + 1), frequency = uses / those of the most used expert; 0 for experts never
    used.  O(k) an event, O(E h) more for one with victims.
    """

    def __init__(self, weights: NetworkWeights, index: int) -> None:
        super().__init__()
        self._network = [getattr(weights, name)[index] for name in ("w1", "b1", "w2", "b2", "w3", "b3")]
        experts = weights.b3.shape[1]
        self._counts = np.zeros(experts, np.float32)
        self._last = np.full(experts, -np.inf, np.float32)
        self._clock = 0
        self._scores: list[float] = []

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._clock += 1
        self._counts[experts] += 1
        self._last[experts] = self._clock
        self._order = None

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        if self._order is None:
            self._scores = (-distances(self.features()[None], self._network)[0]).tolist()
        return super().victim(keep)

    def features(self) -> F32:
        """[2 E]: recency and frequency after the events so far."""
        return np.concatenate(
            [1 / (self._clock - self._last + 1), self._counts / max(1.0, self._counts.max())],
            dtype=np.float32,
        )


def distances(x: F32, network: Sequence[F32]) -> F32:
    """Predicted distances [rows, E] for x [rows, 2 E]."""
    w1, b1, w2, b2, w3, b3 = network
    hidden = _silu(_silu(x @ w1 + b1) @ w2 + b2)
    result: F32 = np.abs(hidden @ w3 + b3)
    return result


def _silu(x: F32) -> F32:
    result: F32 = x / (1 + np.exp(-x))
    return result
