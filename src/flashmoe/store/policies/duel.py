"""A duel: least recently used, until frequencies have proved better, and again when they no longer are."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from flashmoe.store.policies.lfu_decay import LfuDecay
from flashmoe.store.policies.lru import Lru

# Hits by which frequencies must lead before they are followed: a change costs up to 50, since what is resident is not
# what the other would hold (docs/decisions/010).  And the largest lead that is remembered: what it costs when the
# workload turns.
MARGIN, LARGEST = 48, 256


class Score:
    """By how many hits LFU with decay leads LRU, over all layers that share it.

    A cumulative sum that does not fall below zero (Page, Biometrika 1954): a lead counts from where it began.
    """

    def __init__(self) -> None:
        self.lead, self.frequencies = 0, False
        # Layers whose last event has yet to be held against the directories.
        self.waiting: dict[Duel, None] = {}

    def refresh(self) -> None:
        """Do now what the layers' next events would do first."""
        for layer in self.waiting:
            layer.catch_up()
        self.waiting.clear()

    def add(self, hits: int) -> None:
        """LFU with decay has had so many hits more than LRU (or fewer, below 0)."""
        self.lead = max(0, min(LARGEST, self.lead + hits))
        if self.lead >= MARGIN:
            self.frequencies = True
        elif self.lead == 0:
            self.frequencies = False


class Duel:
    """Gives up the expert that LRU would, or LFU with decay, whichever has had more hits in a directory of its own.

    The two directories hold expert numbers only, as many as are resident, and go on as if each policy were alone
    (set dueling: Qureshi et al., ISCA 2007; here each layer keeps both, since an event touches few experts).  LRU is
    followed first, so that it cannot be lost to by more than what a lead forgets.  O(k) an event and O(R log R) in
    refresh(), since an event is held against the directories before the layer's next one only.
    """

    def __init__(self, score: Score) -> None:
        """score: of all layers."""
        self._score = score
        self._mine = Lru(), LfuDecay()  # over what is resident
        self._alone = _Directory(Lru()), _Directory(LfuDecay())
        self._resident, self._full = 0, False  # full: something has had to leave
        self._event: tuple[Sequence[int], int | None] | None = None  # with the capacity that it met
        self._vote = 0

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self.catch_up()
        self._score.add(self._vote)
        self._event = experts, self._resident if self._full else None
        self._score.waiting[self] = None
        for policy in self._mine:
            policy.touch(experts)

    def catch_up(self) -> None:
        """Hold the last event against the directories; the next one adds its outcome to the score."""
        if self._event is None:
            return
        experts, capacity = self._event
        recency, frequency = (directory.touch(experts, capacity) for directory in self._alone)
        self._vote, self._event = frequency - recency, None

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._resident += 1
        for policy in self._mine:
            policy.insert(expert)

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        self._full = True
        self._resident -= 1
        for policy in self._mine:
            policy.remove(expert)

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        return self._mine[self._score.frequencies].victim(keep)


class _Directory:
    """The experts that a policy of its own would hold."""

    def __init__(self, policy: Lru | LfuDecay) -> None:
        self._policy = policy
        self._held: set[int] = set()
        self._last: set[int] = set()  # experts of the last event, which must stay

    def touch(self, experts: Sequence[int], capacity: int | None) -> int:
        """One event; its hits.  capacity: of experts from before it; None: without a limit."""
        if capacity is not None:
            self._shrink(capacity)
        missing = [expert for expert in experts if expert not in self._held]
        self._policy.touch(experts)
        for expert in missing:
            self._policy.insert(expert)
        self._held.update(missing)
        self._last = set(experts)
        return len(experts) - len(missing)

    def _shrink(self, capacity: int) -> None:
        while len(self._held) > capacity:
            expert = self._policy.victim(self._last)
            if expert is None:
                return
            self._policy.remove(expert)
            self._held.remove(expert)
