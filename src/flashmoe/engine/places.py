"""The engine's sequence states: which of them are free, and what each free one still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.models.qwen3_5_moe import SequenceState


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
        best = max(range(len(self._free)), key=lambda i: _common(self._free[i].ids, ids))
        known = _common(self._free[best].ids, ids)
        if known and known >= self._prefixes.longest(ids):
            return self._free.pop(best).state, known
        state = self._free.pop(0).state
        state.clear()
        return state, self._prefixes.restore(state, ids)

    def give(self, state: SequenceState, ids: list[int]) -> None:
        """Give a state back that `ids` have led to; none, if its content is not to be used."""
        self._free.append(_Free(state, ids))


def _common(held: list[int], ids: Sequence[int]) -> int:
    """Tokens of a held sequence that is a prefix of `ids`; 0 for any other, as a state cannot be cut back."""
    return len(held) if len(held) <= len(ids) and held == list(ids[: len(held)]) else 0
