"""The expert cache over a scripted reader: what is read, what stays, and what is left after failures."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from flashmoe.errors import BudgetError, ReadError
from flashmoe.store.cache import ExpertCache
from flashmoe.store.fake_reader import FakeReader, Fault
from flashmoe.store.policies import LayeredLru
from flashmoe.store.slots import SlotArena

RECORD = 4096
MakeWorld = Callable[..., Any]

ORDERS: dict[str, Callable[[int], Sequence[int]]] = {
    "one by one, oldest first": lambda n: [0],
    "one by one, newest first": lambda n: [n - 1],
    "all, newest first": lambda n: range(n - 1, -1, -1),
    "the two newest": lambda n: range(max(0, n - 2), n),
}


def experts_read(world: Any) -> list[tuple[int, int]]:
    """(layer, expert) of every read so far, in order."""
    return [(file - 1, offset // RECORD) for file, offset, _ in world.reader.reads]


def test_misses_are_read_and_hits_are_not(make_world: MakeWorld) -> None:
    world = make_world(4, k=3)
    first = world.request(1, [0, 2, 5])
    assert experts_read(world) == [(1, 0), (1, 2), (1, 5)]
    assert world.request(1, [2, 5]) == {2: first[2], 5: first[5]}
    world.request(1, [0, 4])
    stats = world.cache.stats()
    assert (stats.total.hits, stats.total.misses, stats.bytes_read) == (3, 4, 4 * RECORD)
    assert stats.total.hit_rate == 3 / 7
    assert stats.since(stats).total.hit_rate is None
    assert [counts.misses for counts in stats.layers.values()] == [0, 4, 0]
    world.check()


def test_with_everything_in_memory_a_step_is_answered_at_once(make_world: MakeWorld) -> None:
    world = make_world(18, k=6)
    for layer in range(3):
        assert not world.cache.whole
        world.request(layer, range(6))
    assert world.cache.whole
    before = world.cache.stats()
    world.cache.hit(2, np.array([[4, 0], [5, 0]], np.int32), 3)
    total = world.cache.stats().since(before).total
    assert (total.hits, total.misses) == (3, 0)
    world.check()


def test_a_pool_that_had_to_give_something_up_is_not_whole(make_world: MakeWorld) -> None:
    world = make_world(17, k=6)
    for layer in (0, 1, 2, 0):
        world.request(layer, range(6))
        assert not world.cache.whole
        world.check()


def test_hits_are_there_before_anything_is_waited_for(make_world: MakeWorld) -> None:
    world = make_world(4, k=3)
    world.request(0, [1, 3])
    with world.cache.request(0, [1, 2, 3]) as request:
        assert [expert for expert, _ in request.hits] == [1, 3]
        assert world.reader.outstanding == 1
        assert all(world.holds(slot, 0, expert) for expert, slot in request.hits)
        assert [expert for expert, _ in request.next_ready()] == [2]
        assert request.next_ready() == []


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_completion_gives_the_same_experts(make_world: MakeWorld, name: str) -> None:
    world = make_world(8, k=5, order=ORDERS[name])
    rng = random.Random(1)
    world.reader.script(Fault(2, RECORD, delay=3, times=20))
    for _ in range(30):
        world.request(rng.randrange(3), sorted(rng.sample(range(6), 5)))
        world.check()


def visit(world: Any, layer: int, seen: list[int], most: int = 1) -> None:
    """Stream all experts of a layer; ``seen`` gets them one by one."""
    for expert, slot in world.stream(layer, range(world.experts), most):
        assert world.holds(slot, layer, expert)
        seen.append(expert)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_pool_smaller_than_one_step_is_refused(slots: int) -> None:
    arena = SlotArena(slots, RECORD)
    with pytest.raises(BudgetError, match=r"4 experts: raise --memory"):
        ExpertCache(FakeReader([]), arena, LayeredLru(), {0: (0, RECORD)}, experts_per_token=4)


def test_too_many_experts_at_once_are_refused_and_nothing_is_lost(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.request(2, [0, 1])
    with pytest.raises(BudgetError, match="3 expert slots cannot hold 4: raise --memory"):
        world.cache.request(0, [0, 1, 2, 3])
    world.check()
    world.request(0, [0, 1, 2])
    world.check()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"errno": errno.EIO}, r"Input/output error \(errno 5\)"),
        ({"short": 100}, r"the file ends after 100 of 4096 bytes"),
        ({"flip": True}, "its record: the checksum does not match"),
    ],
    ids=["EIO", "short", "flipped bit"],
)
@pytest.mark.parametrize("name", ORDERS)
class TestFailedReads:
    """One of several reads fails, early or late."""

    def test_a_request_names_the_expert_and_the_next_one_works(
        self, make_world: MakeWorld, name: str, fault: dict[str, Any], words: str
    ) -> None:
        world = make_world(5, k=4, verify=True, order=ORDERS[name])
        world.request(1, [0])
        world.reader.script(Fault(2, 3 * RECORD + 9, **fault))
        with pytest.raises(ReadError, match=rf"layer 1, expert 3: cannot read .*{words}.*flashmoe verify"):
            world.request(1, [0, 2, 3, 4])
        world.check()
        assert (1, 3) not in world.resident()
        assert (1, 0) in world.resident()
        world.request(1, [0, 2, 3, 4])
        world.check()

    def test_a_stream_does_too(
        self, make_world: MakeWorld, name: str, fault: dict[str, Any], words: str
    ) -> None:
        world = make_world(4, verify=True, order=ORDERS[name])
        world.request(0, [1, 3])
        world.reader.script(Fault(3, 4 * RECORD, **fault))
        seen: list[int] = []
        with pytest.raises(ReadError, match=rf"layer 2, expert 4: .*{words}"):
            visit(world, 2, seen)
        assert seen == list(range(len(seen)))
        assert 4 not in seen
        world.check()
        assert [expert for expert, _ in world.stream(2, range(6))] == list(range(6))
        world.check()


def test_the_native_message_names_the_file(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.reader.script(Fault(1, 0, errno=errno.EIO))
    with pytest.raises(ReadError, match=r"cannot read file 1 at byte 0: Input/output") as caught:
        world.request(0, [0, 1])
    assert "\n" not in str(caught.value)


def test_without_checksums_a_wrong_bit_passes(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.reader.script(Fault(1, 7, flip=True))
    with world.cache.request(0, [0]) as request:
        ((expert, slot),) = request.next_ready()
    assert expert == 0
    assert not world.holds(slot, 0, 0)


@pytest.mark.parametrize("consumed", [0, 1])
def test_a_request_left_early_waits_and_frees_its_slots(make_world: MakeWorld, consumed: int) -> None:
    world = make_world(4, k=3, order=ORDERS["one by one, oldest first"])
    with world.cache.request(0, [1, 2, 3]) as request:
        for _ in range(consumed):
            request.next_ready()
        assert world.reader.outstanding == 3 - consumed
    world.check()
    assert world.resident() == {(0, 1)} if consumed else world.resident() == set()


class TestStream:
    """Visiting many experts of a layer once."""

    @pytest.mark.parametrize("most", [1, 4, 64])
    def test_each_expert_is_read_once_in_file_order(self, make_world: MakeWorld, most: int) -> None:
        world = make_world(3, experts=20)
        visited: list[int] = []
        visit(world, 1, visited, most)
        assert visited == list(range(20))
        assert experts_read(world) == [(1, expert) for expert in range(20)]
        world.check()

    @pytest.mark.parametrize("name", ORDERS)
    def test_reads_run_ahead_and_finish_in_any_order(self, make_world: MakeWorld, name: str) -> None:
        world, ahead = make_world(16, experts=40, order=ORDERS[name]), []
        for expert, slot in world.stream(0, range(40)):
            assert world.holds(slot, 0, expert)
            ahead.append(world.reader.outstanding)
        assert max(ahead) >= 7
        assert max(ahead) <= 16
        world.check()

    def test_resident_experts_are_not_read_again(self, make_world: MakeWorld) -> None:
        world = make_world(10)
        world.request(1, [2, 4])
        before = len(world.reader.reads)
        assert [expert for expert, _ in world.stream(1, range(6))] == list(range(6))
        assert experts_read(world)[before:] == [(1, 0), (1, 1), (1, 3), (1, 5)]

    def test_free_slots_keep_what_was_visited(self, make_world: MakeWorld) -> None:
        world = make_world(6)
        list(world.stream(1, [0, 3, 5]))
        assert world.resident() == {(1, 0), (1, 3), (1, 5)}
        world.check()

    def test_a_full_pool_gives_few_slots_and_keeps_the_rest(self, make_world: MakeWorld) -> None:
        world = make_world(24, layers=5, experts=40, k=24)
        world.request(0, range(24))
        for layer in range(1, 5):
            assert [e for e, _ in world.stream(layer, range(40))] == list(range(40))
            assert len(world.resident()) == 12  # half a small pool is all that streaming takes
        world.check()

    def test_the_next_request_has_all_slots_again(self, make_world: MakeWorld) -> None:
        world = make_world(4, k=4)
        world.request(0, range(4))
        list(world.stream(1, range(6)))
        world.request(2, range(4))
        assert len(world.resident()) == 4
        world.check()

    def test_a_pool_full_of_the_layer_itself(self, make_world: MakeWorld) -> None:
        world = make_world(4, k=4)
        world.request(1, range(4))
        before = len(world.reader.reads)
        visited: list[int] = []
        visit(world, 1, visited)
        assert visited == list(range(6))
        assert len(world.reader.reads) - before <= 4  # two missing, and at most two given up for them
        world.check()

    @pytest.mark.parametrize("slots", [2, 5, 9, 17])
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_a_stream_left_early_gives_everything_back(
        self, make_world: MakeWorld, slots: int, steps: int
    ) -> None:
        world = make_world(slots, experts=20, order=ORDERS["one by one, newest first"])
        world.request(0, [0, 1])
        stream = world.stream(1, range(20))
        for _ in range(steps):
            next(stream)
        stream.close()
        world.check()
        world.request(2, [4, 5])
        world.check()

    def test_nothing_to_visit(self, make_world: MakeWorld) -> None:
        world = make_world(2)
        assert list(world.stream(0, [])) == []
        assert world.reader.reads == []


@pytest.mark.parametrize("lost", [False, True], ids=["before fetching", "completions lost"])
class TestCtrlC:
    """KeyboardInterrupt out of wait(): the process may go on, as a notebook does."""

    def test_in_a_request(self, make_world: MakeWorld, lost: bool) -> None:
        world = make_world(4, k=3)
        world.request(0, [0, 1])
        world.reader.interrupts = [(0, lost)]
        with pytest.raises(KeyboardInterrupt):
            world.request(0, [1, 2, 3])
        world.check()
        world.request(0, [1, 2, 3])
        world.check()

    def test_in_a_stream(self, make_world: MakeWorld, lost: bool) -> None:
        world = make_world(4)
        world.request(0, [0, 1])
        world.reader.interrupts = [(2, lost)]
        with pytest.raises(KeyboardInterrupt):
            list(world.stream(1, range(6)))
        world.check()
        assert [expert for expert, _ in world.stream(1, range(6))] == list(range(6))

    def test_twice_costs_slots_but_never_gives_wrong_bytes(self, make_world: MakeWorld, lost: bool) -> None:
        world = make_world(8, k=3, order=ORDERS["one by one, newest first"])
        world.reader.interrupts = [(0, lost), (1, lost)]  # the second one while it waits for what was begun
        with pytest.raises(KeyboardInterrupt):
            world.request(0, [1, 2, 3])
        for layer in range(3):
            world.request(layer, [2, 3, 4])

    def test_in_a_bulk_read(self, make_world: MakeWorld, lost: bool) -> None:
        world = make_world(4)
        world.reader.interrupts = [(0, lost)]
        with pytest.raises(KeyboardInterrupt):
            world.reader.read_many([(1, 0, RECORD, world.arena.buffer, 0)])
        assert world.reader.outstanding == 0
        world.request(0, [0, 1])


def test_an_expert_read_ahead_is_not_read_again(make_world: MakeWorld) -> None:
    world = make_world(6, k=2)
    with world.cache.request(0, [0, 1]) as request:
        while request.next_ready():
            pass
        request.foresee((1, [3, 4]))
        request.foresee((1, [4]))  # it is on its way
    assert experts_read(world)[2:] == [(1, 3), (1, 4)]
    assert world.cache.stats().wasted_bytes == 2 * RECORD
    world.request(1, [2, 4])
    assert experts_read(world)[4:] == [(1, 2)]
    stats = world.cache.stats()
    assert (stats.layers[1].misses, stats.layers[1].foreseen) == (2, 1)
    assert (stats.wasted_bytes, stats.missed_bytes) == (RECORD, 4 * RECORD)
    assert 3 in world.cache.resident(1), "a wrong guess stays: it was read anyway"
    world.check()


def test_a_prompt_takes_over_what_was_read_ahead(make_world: MakeWorld) -> None:
    world = make_world(6, k=2)
    with world.cache.request(0, [0]) as request:
        assert request.next_ready()
        request.foresee((1, [1]))
    visited = [expert for expert, slot in world.stream(1, [0, 1, 2]) if world.holds(slot, 1, expert)]
    assert visited == [0, 1, 2]
    assert experts_read(world).count((1, 1)) == 1
    world.check()


def test_a_prompt_reads_on_for_the_next_layer(make_world: MakeWorld) -> None:
    world = make_world(8, k=2)
    for layer in range(3):
        world.request(layer, [0, 1])
    begun = len(experts_read(world))
    list(world.stream(0, range(6), then=(1, range(6))))
    ahead = [expert for layer, expert in experts_read(world)[begun:] if layer == 1]
    assert ahead == [expert for expert in range(6) if expert not in world.cache.resident(1)][: len(ahead)]
    before = len(experts_read(world))
    visited = [expert for expert, slot in world.stream(1, ahead[1:]) if world.holds(slot, 1, expert)]
    assert visited == ahead[1:] != []
    assert len(experts_read(world)) == before, "all of them were there"
    assert world.cache.stats().wasted_bytes == RECORD
    world.check()
    world.request(2, [0, 1])
    world.check()


def test_a_failed_guess_fails_nobody(make_world: MakeWorld) -> None:
    world = make_world(6, k=2)
    world.reader.script(Fault(2, 3 * RECORD, errno=errno.EIO))
    with world.cache.request(0, [0]) as request:
        assert request.next_ready()
        request.foresee((1, [3]))
    world.request(1, [2])
    assert 3 not in world.cache.resident(1)
    world.check()
    world.request(1, [3])


def test_a_guess_does_not_take_what_the_step_uses(make_world: MakeWorld) -> None:
    world = make_world(2, k=2)
    with world.cache.request(0, [0, 1]) as request:
        while request.next_ready():
            pass
        request.foresee((1, [0, 1, 2]))
        assert set(world.cache.resident(0)) == {0, 1}
    world.check()


def test_a_guess_that_has_landed_is_there_at_once_and_still_was_a_miss(make_world: MakeWorld) -> None:
    world = make_world(6, k=2, order=ORDERS["all, newest first"])
    with world.cache.request(0, [0, 1]) as request:
        request.foresee((1, [3, 4]))
        while request.next_ready():
            pass
    assert world.reader.outstanding == 2, "they began when the step's own reads had ended"
    with world.cache.request(1, [3, 5]) as request:
        assert [expert for expert, _ in request.hits] == [3]
        assert [expert for expert, _ in request.next_ready()] == [5]
    stats = world.cache.stats()
    assert (stats.layers[1].hits, stats.layers[1].misses, stats.layers[1].foreseen) == (0, 2, 1)
    assert (stats.missed_bytes, stats.wasted_bytes) == (4 * RECORD, RECORD)
    assert 4 in world.cache.resident(1), "a wrong guess stays: it was read anyway"
    world.check()


def test_what_was_read_ahead_of_a_later_layer_waits_for_it(make_world: MakeWorld) -> None:
    world = make_world(9, k=2, order=ORDERS["all, newest first"])
    with world.cache.request(0, [0, 1]) as request:
        request.foresee((1, [3]), (2, [4]))
        while request.next_ready():
            pass
    world.check()
    with world.cache.request(1, [3]):
        assert world.cache.coming == {(2, 4)}
    world.check()
    world.request(2, [4, 5])
    assert experts_read(world) == [(0, 0), (0, 1), (1, 3), (2, 4), (2, 5)]
    stats = world.cache.stats()
    assert [stats.layers[n].foreseen for n in range(3)] == [0, 1, 1]
    assert (stats.total.hits, stats.total.misses, stats.wasted_bytes) == (0, 5, 0)
    assert set(world.cache.resident(2)) == {4, 5}
    world.check()


def test_an_expert_that_is_guessed_twice_is_read_once(make_world: MakeWorld) -> None:
    world = make_world(9, k=2)
    with world.cache.request(0, [0]) as request:
        assert request.next_ready()
        request.foresee((1, [3]), (2, [3]), (1, [3, 3]))
    world.request(1, [3])
    assert experts_read(world).count((1, 3)) == 1
    world.check()


def test_what_was_read_ahead_leaves_when_a_small_pool_needs_its_slot(make_world: MakeWorld) -> None:
    world = make_world(4, k=2, order=ORDERS["all, newest first"])
    with world.cache.request(0, [0]) as request:
        request.foresee((2, [3, 4, 5]))
        while request.next_ready():
            pass
    world.request(1, [0, 1])
    world.request(1, [2, 3])
    world.check()


def test_guesses_wait_for_the_step_and_are_taken_back_by_the_next(make_world: MakeWorld) -> None:
    world = make_world(9, k=3, order=ORDERS["one by one, oldest first"])
    with world.cache.request(0, [0, 1, 2]) as request:
        request.foresee((1, [3, 4, 5]))
        for expert in range(3):  # a guess begins when one read is left
            assert [landed for landed, _ in request.next_ready()] == [expert]
        assert request.next_ready() == []
    world.request(1, [5])
    assert world.reader.withdrawn == [(2, 5 * RECORD, RECORD)], "and read by the step itself"
    stats = world.cache.stats()
    assert stats.bytes_read == 6 * RECORD == (len(world.reader.reads) - 1) * RECORD
    assert (stats.layers[1].misses, stats.layers[1].foreseen, stats.wasted_bytes) == (1, 0, 2 * RECORD)
    world.check()


def test_a_second_guess_takes_back_the_first(make_world: MakeWorld) -> None:
    world = make_world(9, k=3)
    with world.cache.request(0, [0, 1, 2]) as request:
        request.foresee((1, [3, 4]))
        request.foresee((1, [4, 5]))
        assert world.reader.withdrawn == [(2, 3 * RECORD, RECORD), (2, 4 * RECORD, RECORD)]
        while request.next_ready():
            pass
    world.request(1, [4, 5])
    assert world.cache.stats().wasted_bytes == 0
    world.check()
