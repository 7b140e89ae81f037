"""Least frequently used."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.store.policies.scored import Counted


class Lfu(Counted):
    """Evicts the expert with the fewest uses; between equals, the one whose last use is longest ago.

    in_cache: counts begin again when an expert has left (as most caches do); otherwise they are of the whole history.
    O(k) an event, O(R log R) one with victims.
    """

    def __init__(self, *, in_cache: bool = False) -> None:
        super().__init__()
        self._in_cache = in_cache
        self._last: dict[int, int] = {}
        self._clock = 0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._clock += 1
        self._add(experts, 1.0)
        for expert in experts:
            self._last[expert] = self._clock

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        super().remove(expert)
        if self._in_cache:
            del self._scores[expert]

    def _sorted(self, resident: set[int]) -> list[int]:
        scores, last = self._scores, self._last
        return sorted(resident, key=lambda expert: (scores[expert], last.get(expert, 0), expert))
