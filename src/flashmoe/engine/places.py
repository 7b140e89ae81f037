"""The engine's sequence states: which of them are free, and what each free one still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.models.decoder import SequenceState


@dataclass(frozen=True)
class _Free:
    state: SequenceState
    ids: list[int] = field(default_factory=list)  # the tokens that have led to the state


class Places:
    """Not thread-safe, apart from len().

    A state that is given back keeps its sequence until it is taken for another one: whoever goes on with that sequence
    copies nothing and needs no snapshot.
    """

    def __init__(self, states: Sequence[SequenceState], prefixes: PrefixCache | None) -> None:
        """prefixes: None to begin every sequence at its start."""
        self._free = [_Free(state) for state in states]  # given back longest ago first
        self._prefixes = prefixes

    def __len__(self) -> int:
        return len(self._free)

    def take(self, ids: Sequence[int]) -> tuple[SequenceState, int]:
        """A free state brought to the longest known prefix of `ids`, and how many tokens that is (0: none is known)."""
        if self._prefixes is None:
            state = self._free.pop(0).state
            state.clear()
            return state, 0
        wanted = np.asarray(ids, np.int32)
        shared = [_common(free.ids, wanted) for free in self._free]
        whole = [n if n == len(free.ids) else 0 for n, free in zip(shared, self._free, strict=True)]
        best = max(range(len(whole)), key=whole.__getitem__)
        if whole[best] and whole[best] >= self._prefixes.longest(ids):
            return self._free.pop(best).state, whole[best]
        state = self._free.pop(self._left_behind(shared)).state
        state.clear()
        return state, self._prefixes.restore(state, ids)

    def _left_behind(self, shared: list[int]) -> int:
        """Which place to give up: one that mostly begins like the new sequence, as it was to become, or the oldest.

        So as many conversations as there are places stay, although their answers come back in another form.
        """
        mostly = (i for i, free in enumerate(self._free) if 2 * shared[i] > len(free.ids))
        return next(mostly, 0)

    def give(self, state: SequenceState, ids: list[int]) -> None:
        """Give a state back that `ids` have led to; none, if its content is not to be used."""
        self._free.append(_Free(state, ids))


def _common(held: list[int], wanted: NDArray[np.int32]) -> int:
    """How many tokens both begin with."""
    most = min(len(held), len(wanted))
    differ = np.flatnonzero(np.asarray(held[:most], np.int32) != wanted[:most])
    return int(differ[0]) if len(differ) else most
