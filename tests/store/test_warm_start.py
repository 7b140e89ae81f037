"""Reading ahead of everybody: only free slots, only while nobody else needs the drive."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flashmoe.store import warm_start
from flashmoe.store.fake_reader import Fault
from flashmoe.store.warm_start import WarmStart

RECORD = 4096


def finished(warm: WarmStart) -> WarmStart:
    warm._thread.join(10)
    assert not warm.running
    return warm


def test_favourites_become_resident_and_count_as_nobodys_misses(make_world: Callable[..., Any]) -> None:
    world = make_world(9)
    finished(WarmStart(world.cache, {0: [4, 1], 2: [5, 0, 3]}, RECORD))
    assert world.resident() == {(0, 4), (0, 1), (2, 5), (2, 0), (2, 3)}
    assert [offset // RECORD for _, offset, _ in world.reader.reads] == [1, 4, 0, 3, 5], "in file order"
    stats = world.cache.stats()
    assert (stats.total.hits, stats.total.misses, stats.missed_bytes) == (0, 0, 0)
    world.check()
    world.request(2, [0, 5])
    assert world.cache.stats().total.hits == 2


def test_the_least_used_one_leaves_first(make_world: Callable[..., Any]) -> None:
    world = make_world(3, layers=1)
    finished(WarmStart(world.cache, {0: [4, 1, 2]}, RECORD))
    world.request(0, [0])
    assert world.resident() == {(0, 1), (0, 2), (0, 0)}


def test_it_ends_when_no_slot_is_free(make_world: Callable[..., Any]) -> None:
    world = make_world(4)
    world.request(1, [0, 1])
    finished(WarmStart(world.cache, {0: [0, 1, 2, 3], 2: [0, 1]}, RECORD))
    assert world.resident() == {(1, 0), (1, 1), (0, 0), (0, 1)}
    world.check()


class Clock:
    """Stands still unless a test moves it."""

    seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


def test_it_waits_until_nobody_has_needed_the_drive_for_a_while(
    make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(warm_start, "time", clock)
    world = make_world(9)
    first, fills = threading.Event(), list[int]()
    original = world.cache.fill

    def fill(layer: int, experts: list[int]) -> bool:
        fills.append(layer)
        first.set()
        return bool(original(layer, experts))

    world.cache.fill = fill
    warm = WarmStart(world.cache, {layer: [0, 1, 2] for layer in range(3)}, 32 << 20)
    assert first.wait(10)
    with warm:
        before = len(fills)
        world.request(1, [0, 5])
        time.sleep(0.2)
        assert len(fills) == before, "a step is running"
    time.sleep(0.2)
    assert len(fills) == before, "the next step may be close"
    clock.seconds += 1
    finished(warm)
    assert warm.error == ""
    world.check()


def test_it_can_be_stopped_at_any_time(make_world: Callable[..., Any]) -> None:
    world = make_world(9)
    warm = WarmStart(world.cache, {layer: [0, 1, 2] for layer in range(3)}, 32 << 20)
    warm.stop()
    warm.stop()
    assert not warm.running
    world.check()


def test_a_bad_record_ends_it_and_fails_nobody(make_world: Callable[..., Any]) -> None:
    world = make_world(9)
    world.reader.script(Fault(1, 2 * RECORD, errno=errno.EIO))
    warm = finished(WarmStart(world.cache, {0: [1, 2], 1: [3]}, RECORD))
    assert "expert 2" in warm.error
    world.check()
    assert (0, 2) not in world.resident()
    world.request(0, [1, 2])
