"""Random histories of the expert cache: requests and streams, finished, abandoned, failing and interrupted."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flashmoe.errors import ReadError
from flashmoe.store.fake_reader import Fault

RECORD = 4096
LAYERS, EXPERTS = 3, 7

layer_numbers = st.integers(0, LAYERS - 1)
expert_numbers = st.integers(0, EXPERTS - 1)
expert_sets = st.sets(expert_numbers, min_size=1)
FAULTS: list[dict[str, Any]] = [{"errno": errno.EIO}, {"short": 11}, {"flip": True}]


class CacheMachine(RuleBasedStateMachine):
    """The pool never grows, every slot has one owner, and whatever a request returns has the expert's bytes."""

    make_world: ClassVar[Callable[..., Any]]

    @initialize(slots=st.integers(2, 9), k=st.integers(1, 4), seed=st.integers(0, 9))
    def open(self, slots: int, k: int, seed: int) -> None:
        rng = random.Random(seed)
        self.world = self.make_world(
            slots,
            layers=LAYERS,
            experts=EXPERTS,
            k=min(k, slots),
            verify=True,
            order=lambda n: rng.sample(range(n), rng.randint(1, n)),
        )

    @rule(layer=layer_numbers, expert=expert_numbers, fault=st.sampled_from(FAULTS), times=st.integers(1, 2))
    def break_a_read(self, layer: int, expert: int, fault: dict[str, Any], times: int) -> None:
        self.world.reader.script(Fault(layer + 1, expert * RECORD + 5, times=times, **fault))

    @rule(layer=layer_numbers, expert=expert_numbers, delay=st.integers(1, 5))
    def delay_a_read(self, layer: int, expert: int, delay: int) -> None:
        self.world.reader.script(Fault(layer + 1, expert * RECORD, delay=delay))

    @rule(layer=layer_numbers, experts=expert_sets)
    def request(self, layer: int, experts: set[int]) -> None:
        wanted = sorted(experts)[: self.world.arena.count]
        self.attempt(layer, wanted, lambda: self.world.request(layer, wanted))

    @rule(layer=layer_numbers, experts=expert_sets, steps=st.integers(0, 3))
    def leave_a_request(self, layer: int, experts: set[int], steps: int) -> None:
        wanted = sorted(experts)[: self.world.arena.count]
        try:
            with self.world.cache.request(layer, wanted) as request:
                for _ in range(steps):
                    assert all(self.world.holds(slot, layer, e) for e, slot in request.next_ready())
        except ReadError:
            assert self.broken_before[layer] & set(wanted)

    @rule(
        layer=layer_numbers,
        experts=expert_sets,
        coming=st.lists(st.tuples(layer_numbers, expert_sets.map(sorted)), min_size=1, max_size=3),
    )
    def foresee(self, layer: int, experts: set[int], coming: list[tuple[int, list[int]]]) -> None:
        """Reads ahead take slots only from experts that no step uses, and never fail anybody."""
        wanted = sorted(experts)[: self.world.k]
        try:
            with self.world.cache.request(layer, wanted) as request:
                slots = dict(request.hits)
                while ready := request.next_ready():
                    slots |= dict(ready)
                if self.world.arena.count > len(wanted) + sum(len(guess) for _, guess in coming):
                    request.foresee(*coming)
                assert all(self.world.holds(slot, layer, expert) for expert, slot in slots.items())
        except ReadError:
            assert self.broken_before[layer] & set(wanted)

    @rule(layer=layer_numbers, experts=expert_sets)
    def fill(self, layer: int, experts: set[int]) -> None:
        """Nothing leaves for what nobody has asked for, and it counts as neither hit nor miss."""
        cache, wanted = self.world.cache, sorted(experts)
        free, resident, before = cache.free_slots, self.world.resident(), cache.stats()
        ahead = (*cache._foreseen.values(), *cache._landed.values())
        coming = {expert for owner, expert in ahead if owner == layer}
        missing = [e for e in wanted if (layer, e) not in resident and e not in coming]
        try:
            assert cache.fill(layer, wanted) == (len(missing) <= free)
            assert {(layer, e) for e in missing[:free]} <= self.world.resident()
        except ReadError:
            assert self.broken_before[layer] & set(missing)
        cache.prefer(layer, wanted)
        assert resident <= self.world.resident()
        done = cache.stats().since(before)
        assert (done.total.hits, done.total.misses, done.total.stall_seconds) == (0, 0, 0.0)
        assert done.missed_bytes == 0

    @rule(layer=layer_numbers, experts=expert_sets)
    def stream(self, layer: int, experts: set[int]) -> None:
        self.attempt(layer, sorted(experts), lambda: self.visit(layer, sorted(experts), len(experts)))

    @rule(
        layer=layer_numbers,
        coming=st.integers(0, LAYERS - 2),
        guess=expert_sets,
        steps=st.integers(0, EXPERTS),
    )
    def stream_and_read_on(self, layer: int, coming: int, guess: set[int], steps: int) -> None:
        """A stream to its end or not, that reads on for another one, which comes or does not."""
        try:
            self.visit(layer, range(EXPERTS), steps, then=((layer + 1 + coming) % LAYERS, sorted(guess)))
        except ReadError:
            assert self.broken_before[layer]

    @rule(
        layer=layer_numbers,
        experts=expert_sets,
        waits=st.integers(0, 3),
        lost=st.booleans(),
        whole=st.booleans(),
    )
    def interrupt(self, layer: int, experts: set[int], waits: int, lost: bool, whole: bool) -> None:
        wanted = sorted(experts)
        self.world.reader.interrupts = [(waits, lost)]
        try:
            if whole:
                self.world.request(layer, wanted[: self.world.arena.count])
            else:
                self.visit(layer, wanted, len(wanted))
        except KeyboardInterrupt:
            assert self.world.reader.interrupts == []
        except ReadError:
            assert self.broken_before[layer]
        self.world.reader.interrupts = []

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            assert len(self.world.resident()) <= self.world.arena.count
            self.broken_before = [self.broken(layer) for layer in range(LAYERS)]

    def attempt(self, layer: int, wanted: list[int], action: Callable[[], Any]) -> None:
        """It fails if and only if a read that it needs was broken; what it counts is what it did."""
        cache, reader = self.world.cache, self.world.reader
        reads, withdrawn = len(reader.reads), len(reader.withdrawn)
        bad, missing = self.broken(layer) & set(wanted), set(wanted) - set(cache.resident(layer))
        foreseen_before = {*cache._foreseen.values(), *cache._arrived.values(), *cache._landed.values()}
        before = cache.stats()
        failure = ""
        try:
            action()
        except ReadError as error:
            failure = str(error)
        assert bool(failure) == any(f"layer {layer}, expert {e}:" in failure for e in bad)
        if failure:
            return
        # An expert that is being read ahead is not always read now: that read may still end well, or unheeded.
        ahead = {expert for owner, expert in foreseen_before if owner == layer}
        assert not bad & missing - ahead
        done = cache.stats().since(before)
        assert done.total.hits + done.total.misses == len(wanted)
        read = len(reader.reads) - reads
        assert read - (len(reader.withdrawn) - withdrawn) == done.bytes_read // RECORD
        # One that landed ahead of its turn in a stream counts as the hit that it has become.
        assert 0 <= done.total.misses - read <= done.total.foreseen <= done.missed_bytes // RECORD - read

    def visit(self, layer: int, experts: Any, steps: int, then: Any = None) -> None:
        """The first `steps` experts of a stream; all of them end it."""
        visited = []
        stream = self.world.stream(layer, experts, then=then)
        for _, (expert, slot) in zip(range(steps), stream, strict=False):
            assert self.world.holds(slot, layer, expert)
            visited.append(expert)
        if steps == len(experts):
            assert list(stream) == []
        stream.close()
        assert visited == list(experts)[:steps]

    def broken(self, layer: int) -> set[int]:
        """Experts whose next read will fail, or fails already."""
        reader = self.world.reader
        faults = [*reader._faults, *(fault for pending in reader._pending for fault in pending.faults)]
        return {f.offset // RECORD for f in faults if f.file == layer + 1 and not f.delay}


def test_random_histories(make_world: Callable[..., Any]) -> None:
    CacheMachine.make_world = staticmethod(make_world)
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
