"""One policy for each layer, and layers that share the pool evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashmoe.store.policies.base import LayerPolicy


class Layered:
    """Evicts from the layer that holds the most experts; there, whichever its own policy names.

    Plain LRU over all layers never hits when the pool is smaller than one token's working set (layers x k),
    because layers are visited in a cycle: what is needed next is always what left last.  Keeping the layers equally
    large gives every layer its share of hits at any pool size.  A layer that reads counts as large as it will be with
    what it reads, so in a full pool it replaces experts of its own; were only those counted that have arrived, it would
    take slots of the layer before and have fewer at its next turn (docs/decisions/010: 3.4 points of hit rate at 12
    slots a layer).  Between layers of equal size the one visited last gives, since it will be needed last.  Cost beside
    the layers' own: O(k) a victim.
    """

    def __init__(self, make: Callable[[int], LayerPolicy], refresh: Callable[[], None] | None = None) -> None:
        """make: the policy of the layer with this number; called when the layer is first heard of."""
        self._make, self._refresh = make, refresh
        self._layers: dict[int, LayerPolicy] = {}
        self._resident: dict[int, set[int]] = {}  # layer -> its experts
        self._by_size: dict[int, dict[int, None]] = {}  # number of experts -> layers, last visited last

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """See Policy."""
        self._layer(layer).touch(experts)
        size = len(self._resident[layer])
        if size:
            peers = self._by_size[size]
            del peers[layer]
            peers[layer] = None

    def insert(self, layer: int, expert: int) -> None:
        """See Policy."""
        self._layer(layer).insert(expert)
        self._resident[layer].add(expert)
        self._resized(layer, -1)

    def remove(self, layer: int, expert: int) -> None:
        """See Policy."""
        self._layers[layer].remove(expert)
        self._resident[layer].remove(expert)
        self._resized(layer, 1)

    def victim(self, layer: int, keep: frozenset[int] | set[int]) -> tuple[int, int] | None:
        """See Policy."""
        resident = self._resident.get(layer, set())
        coming = len(resident) + len(keep - resident)
        if layer in self._layers and coming > max(self._by_size, default=0):
            expert = self._layers[layer].victim(keep)
            if expert is not None:
                return layer, expert
        for size in sorted(self._by_size, reverse=True):
            for candidate in reversed(self._by_size[size]):
                expert = self._layers[candidate].victim(keep if candidate == layer else frozenset())
                if expert is not None:
                    return candidate, expert
        return None

    def refresh(self) -> None:
        """See Policy."""
        if self._refresh is not None:
            self._refresh()

    def _layer(self, layer: int) -> LayerPolicy:
        policy = self._layers.get(layer)
        if policy is None:
            policy = self._layers[layer] = self._make(layer)
            self._resident[layer] = set()
        return policy

    def _resized(self, layer: int, before: int) -> None:
        """The layer had `before` experts more."""
        new = len(self._resident[layer])
        old = new + before
        if old:
            peers = self._by_size[old]
            del peers[layer]
            if not peers:
                del self._by_size[old]
        if new:
            self._by_size.setdefault(new, {})[layer] = None
