"""A linear ranker on causal features, trained on pairs: which of two experts is needed first?"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.store.policies.scored import Scored

F32 = NDArray[np.float32]
DECAYS = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995], np.float32)
FEATURES = 2 * len(DECAYS) + 4


@dataclass(frozen=True)
class PairwiseWeights:
    """weights [FEATURES] float32, one for all layers and experts: they serve any model."""

    weights: F32


class History:
    """The features' state of one layer of E experts: what a step can know before it."""

    def __init__(self, experts: int) -> None:
        self._uses = np.zeros((len(DECAYS), experts), np.float32)
        self._last = np.full(experts, -1e6, np.float32)
        self._counts = np.zeros(experts, np.float32)
        self._clock = 0

    def touch(self, experts: Sequence[int]) -> None:
        """One event."""
        self._clock += 1
        self._uses *= DECAYS[:, None]
        self._uses[:, experts] += 1
        self._last[experts] = self._clock
        self._counts[experts] += 1

    def features(self) -> F32:
        """[FEATURES, E]: decayed counts and their roots, recency, its logarithm, share of all uses, ever used."""
        age = self._clock - self._last
        shares = self._uses * (1 - DECAYS[:, None])
        ever = self._counts > 0
        result: F32 = np.concatenate(
            [
                shares,
                np.sqrt(shares),
                [1 / (age + 1), -np.log1p(np.minimum(age, 1e4)), self._counts / max(1, self._clock), ever],
            ],
            dtype=np.float32,
        )
        return result


class Pairwise(Scored):
    """Evicts whoever is ranked last.  O(E F) an event, F: features."""

    def __init__(self, weights: PairwiseWeights, experts: int) -> None:
        super().__init__()
        self._weights, self._history = weights.weights, History(experts)
        self._scores: list[float] = []

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._history.touch(experts)
        self._order = None

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        if self._order is None:
            self._scores = (self._weights @ self._history.features()).tolist()
        return super().victim(keep)
