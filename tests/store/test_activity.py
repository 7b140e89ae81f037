"""What a watcher of the expert cache sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmoe.store.activity import HIT, IN_FLIGHT, MISS, RESIDENT, Activity

MakeWorld = Callable[..., Any]


def watched(world: Any) -> Activity:
    activity = Activity(dict.fromkeys(range(world.layers), world.experts))
    world.cache.watch(activity)
    return activity


def test_hits_misses_and_what_stays(make_world: MakeWorld) -> None:
    world = make_world(4, k=3)
    activity = watched(world)
    world.request(1, [0, 2])
    world.request(1, [2, 5])
    rows = world.cache.picture(activity)
    assert list(rows[1]) == [MISS | RESIDENT, 0, HIT | RESIDENT, 0, 0, MISS | RESIDENT]
    assert list(world.cache.picture(activity)[1]) == [RESIDENT, 0, RESIDENT, 0, 0, RESIDENT]
    assert not any([*rows[0], *rows[2]])


def test_reads_under_way(make_world: MakeWorld) -> None:
    world = make_world(6, k=3)
    activity = watched(world)
    with world.cache.request(0, [1, 3]) as request:
        assert list(world.cache.picture(activity)[0]) == [0, MISS | IN_FLIGHT, 0, MISS | IN_FLIGHT, 0, 0]
        request.foresee((2, [4]))
        assert world.cache.picture(activity)[2][4] == IN_FLIGHT  # nobody has asked for it
        while request.next_ready():
            pass
    assert list(world.cache.picture(activity)[0]) == [0, RESIDENT, 0, RESIDENT, 0, 0]


def test_a_stream_is_seen_and_nothing_after_the_watch(make_world: MakeWorld) -> None:
    world = make_world(4, k=2)
    activity = watched(world)
    world.request(0, [1])
    assert sorted(expert for expert, _ in world.stream(0, range(world.experts), 1)) == list(
        range(world.experts)
    )
    marks = world.cache.picture(activity)[0]
    assert [mark & (HIT | MISS) for mark in marks] == [MISS, HIT, MISS, MISS, MISS, MISS]
    world.cache.watch(None)
    world.request(1, [0])
    assert not any(mark & (HIT | MISS) for row in world.cache.picture(activity).values() for mark in row)
