"""Snapshots found again, in memory and on the drive; what is damaged or of another bundle is not used."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.engine.prefix_cache import PrefixCache

ROOM = 1 << 20


class State:
    """Stands for a sequence: an array that grows with the position, and one that does not."""

    def __init__(self) -> None:
        self.position = 0
        self.recurrent = np.zeros((3, 8), np.float32)
        self.keys = np.zeros((2, 64, 4), np.float16)

    def arrays(self) -> list[Any]:
        return [self.recurrent, self.keys[:, : -(-self.position // 16)]]

    def growing(self) -> list[bool]:
        return [False, True]

    def restore(self, position: int, arrays: list[list[Any]]) -> None:
        self.position = position
        for mine, pieces in zip(self.arrays(), arrays, strict=True):
            mine[...] = np.concatenate(pieces, axis=1)

    def clear(self) -> None:
        self.position = 0
        self.recurrent.fill(0)


def filled(position: int, value: float) -> Any:
    state = State()
    state.position = position
    state.recurrent.fill(value)
    state.keys.fill(value)
    return state


def restored(cache: PrefixCache, ids: list[int]) -> tuple[int, float]:
    state: Any = State()
    length = cache.restore(state, ids)
    assert state.position == length
    return length, float(state.recurrent[0, 0])


def test_the_longest_prefix_is_found() -> None:
    cache = PrefixCache(ROOM, "model")
    ids = list(range(100))
    cache.store(ids[:20], filled(20, 1.0))
    cache.store(ids[:50], filled(50, 2.0))
    cache.store([7, *ids[1:70]], filled(70, 3.0))
    assert restored(cache, ids) == (50, 2.0)
    assert restored(cache, ids[:49]) == (20, 1.0)
    assert restored(cache, ids[:19]) == (0, 0.0)
    assert restored(cache, [7, *ids[1:]]) == (70, 3.0)
    assert (cache.hits, cache.misses) == (3, 1)


def test_memory_is_bounded_and_the_least_recently_used_leaves() -> None:
    size = sum(array.nbytes for array in filled(20, 0).arrays())
    cache = PrefixCache(2 * size, "model")
    for i in range(3):
        cache.store([i] * 20, filled(20, i))
        assert cache.nbytes <= 2 * size
        assert restored(cache, [0] * 30)[0] == (20 if i < 3 else 0)  # keeps the first one in use
    assert restored(cache, [1] * 30) == (0, 0.0)
    assert restored(cache, [2] * 30) == (20, 2.0)
    PrefixCache(size - 1, "model").store([1] * 20, filled(20, 1))
    assert len(PrefixCache(size - 1, "model")) == 0


def test_it_survives_a_restart(tmp_path: Path) -> None:
    cache = PrefixCache(ROOM, "model", tmp_path, ROOM)
    cache.store([5] * 33, filled(33, 4.0))
    cache.close()
    again = PrefixCache(ROOM, "model", tmp_path, ROOM)
    assert restored(again, [5] * 40) == (33, 4.0)
    assert len(again) == 1, "it is in memory now"
    again.close()
    other = PrefixCache(ROOM, "another model", tmp_path, ROOM)
    assert restored(other, [5] * 40) == (0, 0.0)
    other.close()


def damaged(data: bytes, how: str) -> bytes:
    size = int.from_bytes(data[16:24], "little")
    header = json.loads(data[24 : 24 + size])
    rest = data[24 + size :]
    whole = {
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "cut": data[:-5],
        "empty": b"",
        "magic": b"X" + data[1:],
    }
    if how in whole:
        return whole[how]
    first, _ = header["arrays"]
    if how == "fewer":  # arrays, with their bytes
        header["arrays"], rest = [first], rest[: 4 * first["shape"][0] * first["shape"][1]]
    elif how == "missing":
        del first["shape"]
    elif how == "identity":
        header["identity"] = "another"
    else:
        first |= {
            "huge": {"shape": [1 << 40, 1 << 40]},
            "object": {"dtype": "|O"},
            "shape": {"shape": [8, 3]},
        }[how]
    text = json.dumps(header).encode()
    return data[:16] + len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "how", ["flipped", "cut", "empty", "magic", "huge", "object", "missing", "shape", "fewer", "identity"]
)
def test_what_is_damaged_is_not_used(tmp_path: Path, how: str) -> None:
    cache = PrefixCache(ROOM, "model", tmp_path, ROOM)
    cache.store([5] * 20, filled(20, 4.0))
    cache.close()
    (path,) = tmp_path.glob("*/*.prefix")
    path.write_bytes(damaged(path.read_bytes(), how))
    again = PrefixCache(ROOM, "model", tmp_path, ROOM)
    assert restored(again, [5] * 30) == (0, 0.0)
    again.store([5] * 30, filled(30, 6.0))
    assert restored(again, [5] * 40) == (30, 6.0), "it goes on from nothing"
    again.close()


def test_files_are_bounded_too(tmp_path: Path) -> None:
    cache = PrefixCache(ROOM, "model", tmp_path, 2000)
    for i in range(6):
        cache.store([i] * 20, filled(20, i))
        cache.close()
        cache = PrefixCache(ROOM, "model", tmp_path, 2000)
    files = list(tmp_path.glob("*/*"))
    assert 0 < sum(path.stat().st_size for path in files) <= 2000
    assert all(path.suffix == ".prefix" for path in files)
    assert restored(cache, [5] * 30) == (20, 5.0)
    cache.close()


def test_what_a_conversation_left_behind_goes_first() -> None:
    size = sum(array.nbytes for array in filled(20, 0).arrays())
    # The first one's block stays with the one that goes on from it, so leaving frees a little less than it took.
    cache = PrefixCache(5 * size + 32, "model")
    first, second = [1] * 50, [2] * 50
    cache.store(second[:20], filled(20, 2.0))
    cache.store(first[:20], filled(20, 1.0))
    cache.store(first[:40], filled(40, 1.5))
    while restored(cache, first[:20])[0]:  # the most recently used one, until it goes
        cache.store([len(cache), *range(100, 119)], filled(20, 9.0))
    assert restored(cache, first) == (40, 1.5)
    assert restored(cache, second) == (20, 2.0), "although it was not used for longer"


def test_where_two_conversations_begin_is_not_left_behind() -> None:
    size = sum(array.nbytes for array in filled(40, 0).arrays())
    cache = PrefixCache(3 * size, "model")
    for last in (1, 2):
        cache.store([5] * 20, filled(20, 1.0))
        cache.store([5] * 20 + [last] * 20, filled(40, float(last)))
    assert restored(cache, [5] * 20)[0] == 20
    cache.store([8] * 40, filled(40, 8.0))
    assert restored(cache, [5] * 20)[0] == 20
    assert restored(cache, [5] * 20 + [1] * 20)[0] == 20, "of the others this one was used longest ago"


def test_a_full_drive_costs_the_snapshot_and_nothing_else(tmp_path: Path) -> None:
    ids = list(range(40))
    cache = PrefixCache(ROOM, "model", tmp_path, ROOM)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100, hard)
    )  # the write fails in the middle, as on a full drive
    try:
        cache.store(ids[:20], filled(20, 1.0))
        cache.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert restored(cache, ids) == (20, 1.0), "it is still in memory"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    again = PrefixCache(ROOM, "model", tmp_path, ROOM)
    assert restored(again, ids) == (0, 0.0)
    again.store(ids[:20], filled(20, 1.0))
    again.close()
    assert restored(PrefixCache(ROOM, "model", tmp_path, ROOM), ids) == (20, 1.0)


def conversation(position: int) -> Any:
    """A state whose keys are what its tokens made them, whatever came later."""
    state = filled(position, float(position))
    state.keys[...] = np.arange(64)[None, :, None]
    return state


def has_all(cache: PrefixCache, ids: list[int], position: int) -> bool:
    state: Any = State()
    length, blocks = cache.restore(state, ids), -(-position // 16)
    keys = np.broadcast_to(np.arange(blocks)[None, :, None], (2, blocks, 4))
    return (
        length == position and state.recurrent[0, 0] == position and np.array_equal(state.arrays()[1], keys)
    )


def test_a_snapshot_shares_full_blocks_with_the_one_it_goes_on_from() -> None:
    cache, ids, block = PrefixCache(ROOM, "model"), list(range(1000)), 2 * 4 * 2
    rest = State().recurrent.nbytes
    for position, blocks in (
        (40, 3),
        (40 + 7, 3 + 1),
        (200, 4 + 11),
    ):  # 40 tokens fill two blocks and a part of one
        cache.store(ids[:position], conversation(position))
        assert cache.nbytes == blocks * block + len(cache) * rest
    for position in (40, 47, 200):
        assert has_all(cache, ids[:position], position)
    cache.store([7, *ids[1:100]], conversation(100))
    assert cache.nbytes == (15 + 7) * block + 4 * rest, "another conversation shares nothing"


def test_what_is_shared_stays_while_somebody_has_it() -> None:
    ids, block, rest = list(range(1000)), 2 * 4 * 2, State().recurrent.nbytes
    most = 40 * block + 3 * rest
    cache = PrefixCache(most, "model")
    for position in range(33, 400, 16):
        cache.store(ids[:position], conversation(position))
        assert cache.nbytes <= most
        assert has_all(cache, ids[:position], position)
    assert 1 <= len(cache) < 8, "of 23 those left behind went, and what they shared stayed"


def test_a_long_chain_begins_anew() -> None:
    cache, ids = PrefixCache(ROOM, "model"), list(range(1000))
    for position in range(16, 16 * 40, 16):
        cache.store(ids[:position], conversation(position))
    assert all(has_all(cache, ids[:position], position) for position in range(16, 16 * 40, 16))
    assert max(len(snapshot.pieces[1]) for snapshot in cache._held.values()) == 16


def test_shared_blocks_reach_the_drive(tmp_path: Path) -> None:
    cache, ids = PrefixCache(ROOM, "model", tmp_path, ROOM), list(range(100))
    for position in (20, 45, 90):
        cache.store(ids[:position], conversation(position))
        while cache._unwritten:  # two may wait for the drive
            time.sleep(0.001)
    cache.close()
    again = PrefixCache(ROOM, "model", tmp_path, ROOM)
    assert all(has_all(again, ids[:position], position) for position in (90, 20, 45))
    again.store(ids, conversation(100))
    assert has_all(again, ids, 100), "it goes on from what was read"
    again.close()
