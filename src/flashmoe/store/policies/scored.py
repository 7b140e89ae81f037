"""What policies have in common that keep a number for each expert: the resident one with the lowest leaves."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet


class Scored:
    """Resident experts in the order of their scores, sorted once an event.  O(R log R) an event with victims.

    `_scores[expert]` is a subclass's; whoever changes scores of residents sets `_order` to None.  Between equals the
    lower number leaves.
    """

    def __init__(self) -> None:
        self._scores: dict[int, float] | list[float] = {}
        self._resident: set[int] = set()
        self._order: list[int] | None = None  # of those resident when it was made, lowest score first

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        self._resident.add(expert)
        self._order = None

    def remove(self, expert: int) -> None:
        """See LayerPolicy."""
        self._resident.remove(expert)

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """See LayerPolicy."""
        resident = self._resident
        order = self._order
        if order is None:
            order = self._order = self._sorted(resident)
        for expert in order:
            if expert not in keep and expert in resident:
                return expert
        return None

    def _sorted(self, resident: set[int]) -> list[int]:
        return sorted(sorted(resident), key=self._scores.__getitem__)


class Counted(Scored):
    """Scores that a use adds to, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: dict[int, float] = {}

    def insert(self, expert: int) -> None:
        """See LayerPolicy."""
        super().insert(expert)
        self._scores.setdefault(expert, 0.0)

    def _add(self, experts: Sequence[int], weight: float) -> None:
        self._order = None
        scores = self._scores
        for expert in experts:
            scores[expert] = scores.get(expert, 0.0) + weight
