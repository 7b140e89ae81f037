"""The contract of a replacement policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Policy(Protocol):
    """Orders the resident experts of all layers; the cache tells it what happens.

    One event is everything that one step asks of one layer: replaying single accesses instead inflates the misses
    of recency policies by more than a quarter.  Not thread-safe.  An expert is named by (layer, expert).
    """

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """One event: the step uses these experts of the layer, resident or not."""

    def insert(self, layer: int, expert: int) -> None:
        """The expert has become resident.  It must not have been."""

    def remove(self, layer: int, expert: int) -> None:
        """The expert is not resident any more.  It must have been."""

    def victim(self, layer: int, keep: frozenset[int] | set[int]) -> tuple[int, int] | None:
        """The resident expert to give up for one of `layer`; none of the experts `keep` of that layer.

        None when nothing may leave.  The cache removes it afterwards.
        """
