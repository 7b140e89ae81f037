"""Segmented LRU (Karedla, Love and Wherry, Computer 27(3), 1994)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.base import first_outside


class Slru:
    """New experts are on probation; a second use protects them.  Evicts the least recent one on probation.

    protected: share of the layer's slots that may be protected; whoever is least recent beyond it goes back on
    probation.  O(k) an event, O(k) a victim.
    """

    def __init__(self, protected: float = 0.8) -> None:
        self._share = protected
        self._probation: dict[int, None] = {}  # least recent first
        self._protected: dict[int, None] = {}

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        for expert in experts:
            for segment in (self._probation, self._protected):
                if expert in segment:
                    del segment[expert]
                    self._protected[expert] = None
                    break
        most = int(self._share * (len(self._probation) + len(self._protected)))
        while len(self._protected) > most:
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probation[oldest] = None

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._probation[expert] = None

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        if expert in self._probation:
            del self._probation[expert]
        else:
            del self._protected[expert]

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        expert = first_outside(self._probation, keep)
        return first_outside(self._protected, keep) if expert is None else expert
