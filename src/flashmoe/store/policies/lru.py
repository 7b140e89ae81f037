"""Least recently used within layers that share the pool evenly."""

from __future__ import annotations

from collections.abc import Sequence


class LayeredLru:
    """Evicts from the layer that holds the most experts; there, the least recently used one.

    Plain LRU over all layers never hits when the pool is smaller than one token's working set (layers x k),
    because layers are visited in a cycle: what is needed next is always what left last.  Keeping the layers equally
    large gives every layer its share of hits at any pool size.  Between layers of equal size the one visited last
    gives, since it will be needed last.
    """

    def __init__(self) -> None:
        self._recency: dict[int, dict[int, None]] = {}  # layer -> resident experts, least recent first
        self._by_size: dict[int, dict[int, None]] = {}  # number of experts -> layers, last visited last

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """See Policy."""
        recency = self._recency.get(layer)
        if recency is None:
            return
        for expert in experts:
            if expert in recency:
                del recency[expert]
                recency[expert] = None
        peers = self._by_size[len(recency)]
        del peers[layer]
        peers[layer] = None

    def insert(self, layer: int, expert: int) -> None:
        """See Policy."""
        recency = self._recency.setdefault(layer, {})
        self._resize(layer, len(recency), len(recency) + 1)
        recency[expert] = None

    def remove(self, layer: int, expert: int) -> None:
        """See Policy."""
        recency = self._recency[layer]
        self._resize(layer, len(recency), len(recency) - 1)
        del recency[expert]
        if not recency:
            del self._recency[layer]

    def victim(self, layer: int, keep: frozenset[int] | set[int]) -> tuple[int, int] | None:
        """See Policy."""
        for size in sorted(self._by_size, reverse=True):
            for candidate in reversed(self._by_size[size]):
                kept = keep if candidate == layer else ()
                for expert in self._recency[candidate]:
                    if expert not in kept:
                        return candidate, expert
        return None

    def _resize(self, layer: int, old: int, new: int) -> None:
        if old:
            peers = self._by_size[old]
            del peers[layer]
            if not peers:
                del self._by_size[old]
        if new:
            self._by_size.setdefault(new, {})[layer] = None
