"""Replacement policies: what every one must keep to, what each promises, and the bound of all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.store.policies import LayeredLru, Policy
from flashmoe.store.policies.belady import Belady
from flashmoe.store.policies.fifo import Fifo
from flashmoe.store.policies.flashmoe_net import NetworkWeights
from flashmoe.store.policies.forecast import NEIGHBOURS, ForecastWeights
from flashmoe.store.policies.layered import Layered
from flashmoe.store.policies.learned_file import Learned, Weights
from flashmoe.store.policies.lfu import Lfu
from flashmoe.store.policies.lfu_decay import LfuDecay
from flashmoe.store.policies.lru import Lru
from flashmoe.store.policies.lru_k import LruK
from flashmoe.store.policies.pairwise import FEATURES, PairwiseWeights
from flashmoe.store.policies.registry import SIMPLE, Geometry, learned_maker, policy_maker
from flashmoe.store.policies.sieve import Sieve
from flashmoe.store.policies.slru import Slru

LAYERS, EXPERTS = 4, 6
GEOMETRY = Geometry(tuple(range(LAYERS)), EXPERTS)
Make = Callable[[], Policy]


def random_weights(kind: str) -> Weights:
    rng, layers = np.random.default_rng(5), GEOMETRY.layers

    def some(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    if kind == "pairwise":
        return PairwiseWeights(some(FEATURES))
    if kind == "network":
        sizes = [(2 * EXPERTS, 5), (5,), (5, 5), (5,), (5, EXPERTS), (EXPERTS,)]
        return NetworkWeights(layers, *(some(LAYERS, *size) for size in sizes))
    decays = np.array([0, 0.5, 0.9], np.float32)
    shapes = [
        (3,),
        (LAYERS, EXPERTS, 3, 2),
        (LAYERS, EXPERTS, NEIGHBOURS, 2),
        (LAYERS, EXPERTS, 2),
        (LAYERS, EXPERTS),
    ]
    return ForecastWeights(layers, decays, *(some(*shape) for shape in shapes))


def learned(kind: str) -> Learned:
    counts = np.random.default_rng(2).integers(0, 9, (LAYERS, EXPERTS)).astype(np.float32)
    return Learned("", GEOMETRY.layers, EXPERTS, counts, random_weights(kind), {})


def simple(name: str) -> Make:
    return lambda: policy_maker(name, GEOMETRY)().together()


def trained(kind: str, *, static: bool = False) -> Make:
    return lambda: learned_maker(learned(kind), GEOMETRY, static=static)().together()


# A new policy is added here, or to the registry, and passes what stands above TestLayeredLru.
NAMED: dict[str, Make] = {name: simple(name) for name in SIMPLE} | {
    kind: trained(kind) for kind in ("forecast", "network", "pairwise")
}
NAMED["static"] = trained("forecast", static=True)
NAMED["fifo"] = Fifo
POLICIES = [pytest.param(make, id=name) for name, make in NAMED.items()]
layer_numbers = st.integers(0, LAYERS - 1)
expert_sets = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4)
# One step of one layer: it uses these experts; a pool of so many slots is all there is.
traces = st.lists(st.tuples(layer_numbers, expert_sets), max_size=60)
capacities = st.integers(4, LAYERS * EXPERTS)

Resident = set[tuple[int, int]]
Observe = Callable[[int, set[int], tuple[int, int], Resident], None]


def replay(
    policy: Policy, trace: list[tuple[int, set[int]]], capacity: int, observe: Observe | None = None
) -> list[tuple[int, int] | None]:
    """Do to the policy what the cache does; every victim, None after each step.  Counts no I/O."""
    resident: Resident = set()
    log: list[tuple[int, int] | None] = []
    for layer, experts in trace:
        policy.touch(layer, sorted(experts))
        missing = [e for e in sorted(experts) if (layer, e) not in resident]
        for _ in range(len(resident) + len(missing) - capacity):
            victim = policy.victim(layer, experts)
            assert victim is not None, "a pool that holds one step's experts always has a victim"
            if observe is not None:
                observe(layer, experts, victim, resident)
            policy.remove(*victim)
            resident.remove(victim)
            log.append(victim)
        for expert in missing:
            policy.insert(layer, expert)
            resident.add((layer, expert))
        log.append(None)
    return log


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces, capacity=capacities)
def test_victims_are_resident_and_not_in_use(
    make: Make, trace: list[tuple[int, set[int]]], capacity: int
) -> None:
    def observe(layer: int, experts: set[int], victim: tuple[int, int], resident: Resident) -> None:
        assert victim in resident
        assert not (victim[0] == layer and victim[1] in experts)

    replay(make(), trace, capacity, observe)


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces, capacity=capacities)
def test_the_same_history_gives_the_same_victims(
    make: Make, trace: list[tuple[int, set[int]]], capacity: int
) -> None:
    assert replay(make(), trace, capacity) == replay(make(), trace, capacity)


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces, layer=layer_numbers, keep=expert_sets)
def test_asking_changes_nothing_and_none_means_none(
    make: Make, trace: list[tuple[int, set[int]]], layer: int, keep: set[int]
) -> None:
    policy = make()
    replay(policy, trace, LAYERS * EXPERTS)
    resident = {(number, expert) for number, experts in trace for expert in experts}
    victim = policy.victim(layer, keep)
    assert policy.victim(layer, keep) == victim
    assert (victim is None) == (resident <= {(layer, expert) for expert in keep})


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces)
def test_everything_can_leave_one_after_the_other(make: Make, trace: list[tuple[int, set[int]]]) -> None:
    policy = make()
    replay(policy, trace, LAYERS * EXPERTS)
    left = {(number, expert) for number, experts in trace for expert in experts}
    while (victim := policy.victim(0, frozenset())) is not None:
        left.remove(victim)
        policy.remove(*victim)
    assert not left


def reads(policy: Policy, trace: list[tuple[int, set[int]]], capacity: int) -> int:
    """Experts that were not resident when asked for."""
    count, resident = 0, set[tuple[int, int]]()
    for layer, experts in trace:
        policy.touch(layer, sorted(experts))
        missing = [e for e in sorted(experts) if (layer, e) not in resident]
        count += len(missing)
        for _ in range(len(resident) + len(missing) - capacity):
            victim = policy.victim(layer, experts)
            assert victim is not None
            policy.remove(*victim)
            resident.remove(victim)
        for expert in missing:
            policy.insert(layer, expert)
            resident.add((layer, expert))
    return count


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces, capacity=capacities)
def test_nobody_reads_less_than_belady(make: Make, trace: list[tuple[int, set[int]]], capacity: int) -> None:
    bound = Belady([(layer, sorted(experts)) for layer, experts in trace])
    assert reads(bound, trace, capacity) <= reads(make(), trace, capacity)


@settings(deadline=None, max_examples=40)
@given(
    trace=st.lists(
        st.tuples(st.integers(0, 1), st.sets(st.integers(0, 3), min_size=1, max_size=2)), max_size=9
    ),
    capacity=st.integers(2, 5),
)
def test_belady_is_what_trying_everything_finds(trace: list[tuple[int, set[int]]], capacity: int) -> None:
    states = {frozenset[tuple[int, int]](): 0}
    for layer, experts in trace:
        wanted = {(layer, expert) for expert in experts}
        following: dict[frozenset[tuple[int, int]], int] = {}
        for held, cost in states.items():
            total, rest = cost + len(wanted - held), held - wanted
            for kept in itertools.combinations(sorted(rest), min(len(rest), capacity - len(wanted))):
                after = frozenset(wanted | set(kept))
                following[after] = min(total, following.get(after, total))
        states = following
    bound = Belady([(layer, sorted(experts)) for layer, experts in trace])
    assert reads(bound, trace, capacity) == min(states.values())


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None, max_examples=25)  # for each of so many policies
@given(trace=traces, capacity=capacities, at=st.sets(st.integers(0, 60)))
def test_refreshing_between_events_changes_no_victim(
    make: Make, trace: list[tuple[int, set[int]]], capacity: int, at: set[int]
) -> None:
    class Refreshed:
        def __init__(self) -> None:
            self.policy, self.events = make(), 0
            self.insert, self.remove, self.victim = self.policy.insert, self.policy.remove, self.policy.victim

        def touch(self, layer: int, experts: Any) -> None:
            if self.events in at:
                self.policy.refresh()
            self.events += 1
            self.policy.touch(layer, experts)

        def refresh(self) -> None:
            self.policy.refresh()

    assert replay(Refreshed(), trace, capacity) == replay(make(), trace, capacity)


def one_layer(policy: Any, *events: set[int], capacity: int) -> list[int]:
    """The victims of a layer with so many slots."""
    steps = [(0, event) for event in events]
    return [
        victim[1] for victim in replay(Layered(lambda layer: policy), steps, capacity) if victim is not None
    ]


class TestOrders:
    """Who leaves, where the answer is known."""

    def test_lru(self) -> None:
        assert one_layer(Lru(), {0}, {1}, {0}, {2}, capacity=2) == [1]

    def test_fifo_looks_at_no_use(self) -> None:
        assert replay(Fifo(), [(0, {1}), (0, {2}), (0, {1}), (0, {3})], 2)[-2] == (0, 1)

    def test_lfu_remembers_who_left_and_in_cache_does_not(self) -> None:
        events = ({0}, {0}, {1}, {2}, {0}, {1}, {1}, {3})
        assert one_layer(Lfu(), *events, capacity=2)[-1] == 0
        events = ({0}, {0}, {0}, {1}, {2}, {3}, {0}, {1})
        assert one_layer(Lfu(in_cache=True), *events, capacity=2) == [1, 2, 3]

    def test_decay_forgets(self) -> None:
        events = [{0}] * 5 + [{1}] * 4 + [{2}]
        assert one_layer(Lfu(), *events, capacity=2) == [1]
        assert one_layer(LfuDecay(0.5), *events, capacity=2) == [0]

    def test_decay_goes_on_beyond_any_float(self) -> None:
        policy = LfuDecay(0.5)
        assert one_layer(policy, *[{i % 3} for i in range(3000)], capacity=2)[-1] in range(3)

    def test_lru_2_looks_at_the_last_but_one_use(self) -> None:
        assert one_layer(LruK(2), {0}, {0}, {1}, {2}, capacity=2) == [1]

    def test_a_second_use_protects(self) -> None:
        assert one_layer(Slru(0.5), {0}, {1}, {0}, {2}, {3}, capacity=2) == [1, 2]

    def test_sieve_spares_who_was_used_once(self) -> None:
        assert one_layer(Sieve(), {0}, {1}, {0}, {2}, {3}, capacity=2) == [1, 0]


class TestLayeredLru:
    """The order in which layered LRU lets experts go."""

    def test_the_largest_layer_gives_its_least_recently_used(self) -> None:
        policy = LayeredLru()
        for layer, expert in ((0, 1), (1, 1), (1, 2), (1, 3)):
            policy.insert(layer, expert)
        policy.touch(1, [1])
        assert policy.victim(0, frozenset()) == (1, 2)

    def test_between_equal_layers_the_one_visited_last_gives(self) -> None:
        policy = LayeredLru()
        for layer in range(3):
            policy.insert(layer, 5)
        policy.touch(1, [5])
        assert policy.victim(0, frozenset()) == (1, 5)

    def test_a_layer_counts_what_it_reads(self) -> None:
        policy = LayeredLru()
        for layer, expert in ((0, 1), (0, 2), (1, 1), (1, 2)):
            policy.insert(layer, expert)
        policy.touch(1, [2])
        assert policy.victim(0, {3, 4}) == (0, 1)
        policy.remove(0, 1)
        assert policy.victim(0, {3, 4}) == (0, 2), "or layer 0 would hold three of the four"

    def test_what_is_in_use_is_passed_over(self) -> None:
        policy = LayeredLru()
        for expert in range(3):
            policy.insert(0, expert)
        policy.insert(1, 9)
        assert policy.victim(0, {0, 1}) == (0, 2)
        assert policy.victim(0, {0, 1, 2}) == (1, 9)
        policy.remove(1, 9)
        assert policy.victim(0, {0, 1, 2}) is None

    def test_touching_what_is_not_resident_is_harmless(self) -> None:
        policy = LayeredLru()
        policy.touch(3, [1, 2])
        policy.insert(3, 1)
        policy.touch(3, [2])
        assert policy.victim(0, frozenset()) == (3, 1)

    @pytest.mark.parametrize("capacity", [4, 6, 9, 14])
    def test_a_pool_smaller_than_a_tokens_working_set_still_hits(self, capacity: int) -> None:
        # Eight layers x two experts are 16; plain LRU over all of them would miss every time.
        steps = [(layer, {0, 1}) for _ in range(20) for layer in range(8)]
        read = sum(victim is not None for victim in replay(LayeredLru(), steps, capacity)) + capacity
        assert read < 20 * 16 - 19 * (capacity - 2)  # all but two slots hit once a token from the second on

    @settings(deadline=None)
    @given(trace=traces, capacity=capacities)
    def test_the_victim_comes_from_a_largest_layer_with_something_to_give(
        self, trace: list[tuple[int, set[int]]], capacity: int
    ) -> None:
        def observe(layer: int, experts: set[int], victim: tuple[int, int], resident: Resident) -> None:
            coming = resident | {(layer, expert) for expert in experts}
            sizes = [sum(number == candidate for number, _ in coming) for candidate in range(LAYERS)]
            giving = [
                size
                for number, size in enumerate(sizes)
                if any(n == number and not (n == layer and e in experts) for n, e in resident)
            ]
            assert sizes[victim[0]] == max(giving)

        replay(LayeredLru(), trace, capacity, observe)

    def test_within_a_layer_it_is_plain_lru(self) -> None:
        rng, policy = random.Random(6), LayeredLru()
        steps = [(0, set(rng.sample(range(EXPERTS), 2))) for _ in range(300)]
        recency: list[int] = []
        expected: list[tuple[int, int] | None] = []
        for _, experts in steps:
            known = set(recency)
            recency = [e for e in recency if e not in experts] + [e for e in sorted(experts) if e in known]
            new = [e for e in sorted(experts) if e not in known]
            expected += [(0, recency.pop(0)) for _ in range(len(recency) + len(new) - 4)]
            recency += new
            expected.append(None)
        assert replay(policy, steps, 4) == expected
