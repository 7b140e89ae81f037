"""Least frequently used, where a use counts less the longer ago it is."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.store.policies.scored import Counted

_LARGEST = 1e100


class LfuDecay(Counted):
    """A use n events ago counts decay ** n; an expert's history goes on while it is not resident.

    Instead of all scores decaying, what a use adds grows.  O(k) an event, O(R log R) one with victims.
    """

    def __init__(self, decay: float = 0.95) -> None:
        super().__init__()
        self._growth, self._weight = 1 / decay, 1.0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._weight *= self._growth
        self._add(experts, self._weight)
        if self._weight > _LARGEST:
            for expert in self._scores:
                self._scores[expert] /= self._weight
            self._weight = 1.0
