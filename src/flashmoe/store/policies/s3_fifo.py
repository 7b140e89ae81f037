"""S3-FIFO (Yang et al., SOSP 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

_MOST_USES = 3  # two bits, as published


class S3Fifo:
    """A small queue for who is new, a main queue for who was used again or came back, names of who left the small one.

    small: share of the layer's slots for the small queue.  O(k) an event, O(R) a victim.
    """

    def __init__(self, small: float = 0.1) -> None:
        self._share = small
        self._small: dict[int, None] = {}  # oldest first
        self._main: dict[int, None] = {}
        self._gone: dict[int, None] = {}
        self._uses: dict[int, int] = {}
        self._plan: tuple[int, dict[int, None], dict[int, None], dict[int, int]] | None = None

    def touch(self, experts: Sequence[int]) -> None:
        """See LayerPolicy."""
        self._plan = None
        for expert in experts:
            if expert in self._uses:
                self._uses[expert] = min(_MOST_USES, self._uses[expert] + 1)

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._plan = None
        self._uses[expert] = 0
        if expert in self._gone:
            del self._gone[expert]
            self._main[expert] = None
        else:
            self._small[expert] = None

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        if self._plan is not None and self._plan[0] == expert:
            _, self._small, self._main, self._uses = self._plan
        capacity = len(self._uses)
        if expert in self._small:
            del self._small[expert]
            self._gone[expert] = None
            while len(self._gone) > capacity:
                del self._gone[next(iter(self._gone))]
        else:
            del self._main[expert]
        del self._uses[expert]
        self._plan = None

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        if all(expert in keep for expert in self._uses):
            return None
        small, main, uses = dict(self._small), dict(self._main), dict(self._uses)
        most = max(1, int(self._share * len(uses)))
        while True:  # every turn moves an expert on, lowers its count, or ends
            if _goes_on(small, main, uses, most, keep):
                continue
            queue = small if len(small) >= most or not main else main
            for expert in (*queue, *main, *small):
                if expert not in keep and uses[expert] == 0:
                    self._plan = (expert, small, main, uses)
                    return expert
            for expert in (*main, *small):  # everybody who may leave was used: as if the queue went round
                uses[expert] = max(0, uses[expert] - 1)


def _goes_on(
    small: dict[int, None],
    main: dict[int, None],
    uses: dict[int, int],
    most: int,
    keep: AbstractSet[int],
) -> bool:
    """One step of the queues: who was used moves to main, or to its end with one use less; False when none was."""
    if len(small) >= most or not main:
        expert = next((e for e in small if e not in keep), None)
        if expert is not None and uses[expert] > 0:
            del small[expert]
            main[expert], uses[expert] = None, 0
            return True
        return False
    expert = next((e for e in main if e not in keep), None)
    if expert is not None and uses[expert] > 0:
        del main[expert]
        main[expert] = None
        uses[expert] -= 1
        return True
    return False
