"""Least recently used."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.base import first_outside
from flashmoe.store.policies.layered import Layered


class Lru:
    """Evicts the expert whose last use is longest ago.  O(k) an event, O(k) a victim."""

    def __init__(self) -> None:
        self._recency: dict[int, None] = {}  # resident experts, least recent first

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        recency = self._recency
        for expert in experts:
            if expert in recency:
                del recency[expert]
                recency[expert] = None

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._recency[expert] = None

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        del self._recency[expert]

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        return first_outside(self._recency, keep)


class LayeredLru(Layered):
    """LRU within layers that share the pool evenly."""

    def __init__(self) -> None:
        super().__init__(lambda layer: Lru())
