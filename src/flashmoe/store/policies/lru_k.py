"""LRU-K (O'Neil, O'Neil and Weikum, SIGMOD 1993)."""

from __future__ import annotations

from collections.abc import Sequence

from flashmoe.store.policies.scored import Scored


class LruK(Scored):
    """Evicts the expert whose last but one use is longest ago (uses=2); never used so often counts as longest.

    The history goes on while an expert is not resident.  O(k) an event, O(R log R) one with victims.
    """

    def __init__(self, uses: int = 2) -> None:
        super().__init__()
        self._never = (0,) * uses
        self._times: dict[
            int, tuple[int, ...]
        ] = {}  # of the last `uses`, oldest first; 0 where there were fewer
        self._clock = 0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._clock += 1
        self._order = None
        for expert in experts:
            self._times[expert] = (*self._times.get(expert, self._never)[1:], self._clock)

    def _sorted(self, resident: set[int]) -> list[int]:
        times, never = self._times, self._never
        return sorted(resident, key=lambda expert: (times.get(expert, never), expert))
