"""Free sequences that still hold what they held, and which of them is given up."""

from __future__ import annotations

from typing import Any

from tests.engine.test_prefix_cache import ROOM, State, filled

from flashmoe.engine.places import Places
from flashmoe.engine.prefix_cache import PrefixCache


def places(count: int, cache: PrefixCache | None) -> Places:
    states: list[Any] = [State() for _ in range(count)]
    return Places(states, cache)


def used(at: Places, ids: list[int]) -> tuple[Any, int]:
    """Take a place for the ids, process the rest of them, and give it back."""
    state, known = at.take(ids)
    state.position = len(ids)
    at.give(state, ids)
    return state, known


def test_a_sequence_goes_on_where_it_is() -> None:
    at = places(2, PrefixCache(0, "model"))
    state, known = used(at, [1, 2, 3])
    assert known == 0
    assert used(at, [7, 8])[1] == 0
    again, known = used(at, [1, 2, 3, 4, 5])
    assert (again is state, known) == (True, 3)
    assert used(at, [1, 2, 9])[1] == 0, "a state cannot be cut back"
    assert len(at) == 2


def test_the_longer_snapshot_is_preferred() -> None:
    cache = PrefixCache(ROOM, "model")
    cache.store([1] * 20, filled(20, 4.0))
    at = places(2, cache)
    used(at, [1] * 10)
    state, known = at.take([1] * 30)
    assert (known, state.position) == (20, 20)


def test_an_answer_in_another_form_takes_the_place_of_its_own_conversation() -> None:
    at = places(3, PrefixCache(0, "model"))
    talks = [[i] * 20 for i in (1, 2, 3)]
    for talk in talks:
        used(at, [*talk, 50, 51])  # as it was generated
    for talk in talks:
        used(at, [*talk, 60, 61])  # as it comes back
    assert [used(at, [*talk, 60, 61, 70])[1] for talk in talks] == [22, 22, 22]


def test_without_a_cache_everything_begins_at_its_start() -> None:
    at = places(1, None)
    used(at, [1, 2])
    assert at.take([1, 2, 3])[1] == 0


def test_a_state_that_is_of_no_use_is_not_used() -> None:
    at = places(1, PrefixCache(0, "model"))
    state, _ = at.take([1, 2])
    at.give(state, [])
    assert at.take([1, 2])[1] == 0
