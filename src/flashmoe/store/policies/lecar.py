"""LeCaR: two experts, weighted by regret (Vietri et al., HotStorage 2018)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.base import first_outside
from flashmoe.store.policies.lfu import Lfu


class LeCaR:
    """Follows LRU or LFU by chance; whose victims are asked for again soon is followed less often from then on.

    Deterministic for a seed.  O(k) an event, O(R log R) one with victims.
    """

    LEARNING_RATE = 0.45  # as published
    DISCOUNT = 0.005  # as published: a regret of one capacity ago is worth this share

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._draw = self._random.random()
        self._recency: dict[int, None] = {}
        self._frequency = Lfu()
        self._weight = 0.5  # of LRU
        self._gone: dict[int, tuple[bool, int]] = {}  # expert -> (LRU's doing, when), oldest first
        self._choice: tuple[int, bool] | None = None
        self._clock = 0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._clock += 1
        self._choice = None
        self._frequency.touch(experts)
        for expert in experts:
            if expert in self._recency:
                del self._recency[expert]
                self._recency[expert] = None
            elif expert in self._gone:
                self._regret(*self._gone.pop(expert))

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._choice = None
        self._recency[expert] = None
        self._frequency.insert(expert)
        self._gone.pop(expert, None)

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        lru = self._choice is None or self._choice != (expert, False)
        self._gone[expert] = (lru, self._clock)
        while len(self._gone) > len(self._recency):
            del self._gone[next(iter(self._gone))]
        del self._recency[expert]
        self._frequency.remove(expert)
        self._choice, self._draw = None, self._random.random()

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        lru = self._draw < self._weight
        expert = first_outside(self._recency, keep) if lru else self._frequency.victim(keep)
        self._choice = None if expert is None else (expert, lru)
        return expert

    def _regret(self, lru: bool, when: int) -> None:
        reward = self.DISCOUNT ** ((self._clock - when) / max(1, len(self._recency)))
        punished = math.exp(-self.LEARNING_RATE * reward)
        mine, other = self._weight, 1 - self._weight
        if lru:
            mine *= punished
        else:
            other *= punished
        self._weight = min(0.99, max(0.01, mine / (mine + other)))
