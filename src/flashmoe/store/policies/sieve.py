"""SIEVE (Zhang et al., NSDI 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet


class Sieve:
    """One queue and a hand that moves from old to new: it spares, once, who was used since it last came by.

    O(k) an event, O(R) a victim.
    """

    def __init__(self) -> None:
        self._queue: list[int] = []  # oldest first
        self._used: set[int] = set()
        self._hand = 0  # index of whom the hand looks at next
        self._plan: tuple[int, set[int]] | None = None  # (victim, whom the hand spares on its way)

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._plan = None
        self._used.update(expert for expert in experts if expert in self._queue)

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._plan = None
        self._queue.append(expert)

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        place = self._queue.index(expert)
        if self._plan is not None and self._plan[0] == expert:
            self._used -= self._plan[1]
            self._hand = place
        elif place < self._hand:
            self._hand -= 1
        del self._queue[place]
        if self._hand >= len(self._queue):  # beyond the newest: again from the oldest
            self._hand = 0
        self._used.discard(expert)
        self._plan = None

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        queue, spared = self._queue, set[int]()
        for step in range(2 * len(queue)):  # in the second round nobody has been used since the first
            expert = queue[(self._hand + step) % len(queue)]
            if expert in self._used and expert not in spared:
                spared.add(expert)
            elif expert not in keep:
                self._plan = (expert, spared - {expert})
                return expert
        return None
