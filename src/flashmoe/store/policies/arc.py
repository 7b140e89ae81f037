"""Adaptive replacement cache (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.base import first_outside


class Arc:
    """Two LRU lists, of experts used once and used again, and the names of those that left either lately.

    A miss on a remembered name moves the target between the lists.  The published algorithm evicts one for each
    miss in turn; here all experts of an event are seen before its first victim.  O(k) an event, O(k) a victim.
    """

    def __init__(self) -> None:
        self._once: dict[int, None] = {}  # T1, least recent first
        self._again: dict[int, None] = {}  # T2
        self._gone_once: dict[int, None] = {}  # B1
        self._gone_again: dict[int, None] = {}  # B2
        self._target = 0.0  # of the size of T1

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        capacity = len(self._once) + len(self._again)
        for expert in experts:
            if expert in self._once or expert in self._again:
                self._once.pop(expert, None)
                self._again.pop(expert, None)
                self._again[expert] = None
            elif expert in self._gone_once:
                step = max(1.0, len(self._gone_again) / len(self._gone_once))
                self._target = min(float(capacity), self._target + step)
            elif expert in self._gone_again:
                step = max(1.0, len(self._gone_once) / len(self._gone_again))
                self._target = max(0.0, self._target - step)

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        if expert in self._gone_once or expert in self._gone_again:
            self._gone_once.pop(expert, None)
            self._gone_again.pop(expert, None)
            self._again[expert] = None
        else:
            self._once[expert] = None

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        capacity = len(self._once) + len(self._again)
        if expert in self._once:
            del self._once[expert]
            self._gone_once[expert] = None
        else:
            del self._again[expert]
            self._gone_again[expert] = None
        while self._gone_once and len(self._once) + len(self._gone_once) > capacity:
            del self._gone_once[next(iter(self._gone_once))]
        while self._gone_again and len(self._gone_once) + len(self._gone_again) > capacity:
            del self._gone_again[next(iter(self._gone_again))]

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        lists = (self._once, self._again) if len(self._once) > self._target else (self._again, self._once)
        for order in lists:
            expert = first_outside(order, keep)
            if expert is not None:
                return expert
        return None
