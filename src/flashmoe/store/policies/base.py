"""The contract of a replacement policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
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

        None when nothing may leave.  The cache removes it afterwards.  Asking changes nothing.
        """

    def refresh(self) -> None:
        """Do now what was put off; the cache calls it while it waits for reads.  Never changes a victim."""


class LayerPolicy(Protocol):
    """The same for the experts of one layer; policies/layered.py makes a Policy of one for each layer.

    It is told no capacity: when a victim is asked for, the layer's share of the pool is what is resident.  E: experts
    of the layer, R: resident ones, k: experts of an event.
    """

    def touch(self, experts: Sequence[int]) -> None:
        """One event: the step uses these experts, resident or not; its misses are inserted later."""

    def insert(self, expert: int) -> None:
        """The expert has become resident."""

    def remove(self, expert: int) -> None:
        """The expert is not resident any more."""

    def victim(self, keep: AbstractSet[int]) -> int | None:
        """The resident expert to give up, none of `keep`; None when there is no other.  Asking changes nothing."""


def first_outside(order: Iterable[int], keep: AbstractSet[int]) -> int | None:
    """The first of `order` that is not in `keep`."""
    for expert in order:
        if expert not in keep:
            return expert
    return None
