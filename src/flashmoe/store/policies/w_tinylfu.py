"""W-TinyLFU (Einziger, Friedman and Manes, ACM Transactions on Storage 13(4), 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.base import first_outside
from flashmoe.store.policies.slru import Slru

_SAMPLE = 10  # uses for each slot after which all counts are halved, as published


class WTinyLfu:
    """A window for who is new; its oldest and the main part's victim compete by frequency, and the rarer one leaves.

    A layer has so few experts that counts are exact; no sketch is needed.  window: share of the layer's slots (0.4
    won for expert traces, where 0.01 is usual).  O(k) an event, O(k) a victim, O(E) at each halving.
    """

    def __init__(self, window: float = 0.4) -> None:
        self._share = window
        self._window: dict[int, None] = {}  # least recent first
        self._main = Slru()
        self._in_main: set[int] = set()
        self._counts: dict[int, int] = {}
        self._total = 0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        for expert in experts:
            self._counts[expert] = self._counts.get(expert, 0) + 1
            if expert in self._window:
                del self._window[expert]
                self._window[expert] = None
        self._total += len(experts)
        if self._total > _SAMPLE * max(1, len(self._window) + len(self._in_main)):
            self._counts = {expert: count // 2 for expert, count in self._counts.items()}
            self._total = sum(self._counts.values())
        self._main.touch(experts)

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._window[expert] = None
        if len(self._window) > max(1, int(self._share * (len(self._window) + len(self._in_main)))):
            oldest = next(iter(self._window))  # it has won against whoever left, or there was room
            del self._window[oldest]
            self._in_main.add(oldest)
            self._main.insert(oldest)

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        if expert in self._window:
            del self._window[expert]
        else:
            self._in_main.remove(expert)
            self._main.remove(expert)

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        oldest, weakest = first_outside(self._window, keep), self._main.victim(keep)
        if oldest is None or weakest is None:
            return weakest if oldest is None else oldest
        return oldest if self._counts.get(oldest, 0) < self._counts.get(weakest, 0) else weakest
