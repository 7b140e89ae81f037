"""Belady's optimum: the bound of every policy (IBM Systems Journal 5(2), 1966).  It knows the future: replay only."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

NEVER = 1 << 62


class Belady:
    """Evicts whoever is needed last.  With uniform records and mandatory admission nothing has more hits.

    Implements Policy for layers that share a pool, or for a single one.  O(k log n) an event and victim, n: events
    since the last victim.
    """

    def __init__(self, events: Sequence[tuple[int, Sequence[int]]]) -> None:
        """events: all (layer, experts) that touch() will be told, in order."""
        self._next = next_uses(events)
        self._clock = 0
        self._due: dict[tuple[int, int], int] = {}  # the event that needs it next
        self._resident: set[tuple[int, int]] = set()
        self._heap: list[tuple[int, int, int]] = []  # (-due, layer, expert); stale ones are skipped

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """See Policy."""
        due = self._next[self._clock]
        self._clock += 1
        for expert, when in zip(experts, due, strict=True):
            self._due[layer, expert] = when
            if (layer, expert) in self._resident:
                heappush(self._heap, (-when, layer, expert))

    def insert(self, layer: int, expert: int) -> None:
        """See Policy."""
        self._resident.add((layer, expert))
        heappush(self._heap, (-self._due.get((layer, expert), NEVER), layer, expert))

    def remove(self, layer: int, expert: int) -> None:
        """See Policy."""
        self._resident.remove((layer, expert))

    def victim(self, layer: int, keep: frozenset[int] | set[int]) -> tuple[int, int] | None:
        """See Policy."""
        heap, kept, found = self._heap, [], None
        while heap:
            minus, owner, expert = heap[0]
            key = (owner, expert)
            if key not in self._resident or -minus != self._due.get(key, NEVER):
                heappop(heap)
            elif owner == layer and expert in keep:
                kept.append(heappop(heap))
            else:
                found = key
                break
        for entry in kept:
            heappush(heap, entry)
        return found

    def refresh(self) -> None:
        """See Policy; nothing is put off."""


def next_uses(events: Sequence[tuple[int, Sequence[int]]]) -> list[list[int]]:
    """For each event and each of its experts, the number of the next event that uses it; NEVER if none does."""
    coming: dict[tuple[int, int], int] = {}
    due: list[list[int]] = []
    for number in range(len(events) - 1, -1, -1):
        layer, experts = events[number]
        due.append([coming.get((layer, expert), NEVER) for expert in experts])
        for expert in experts:
            coming[layer, expert] = number
    due.reverse()
    return due
