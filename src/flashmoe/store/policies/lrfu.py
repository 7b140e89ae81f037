"""Between LRU and LFU (Lee et al., IEEE Transactions on Computers 50(12), 2001)."""

from __future__ import annotations

from flashmoe.store.policies.lfu_decay import LfuDecay


class Lrfu(LfuDecay):
    """Evicts the lowest combined recency and frequency: the sum of 2 ** (-strength * age) over an expert's uses.

    As published, an expert that leaves loses its history; that is what tells it from LfuDecay.  strength 0 is LFU
    in cache, 1 is LRU.  O(k) an event, O(R log R) one with victims.
    """

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__(0.5**strength)

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        super().remove(expert)
        del self._scores[expert]
