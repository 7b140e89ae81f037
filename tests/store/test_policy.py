"""Replacement policies: what every one must keep to, and what layered LRU promises."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.store.policies import LayeredLru, Policy

LAYERS, EXPERTS = 4, 6
POLICIES = [LayeredLru]  # a new policy is added here and passes what stands above TestLayeredLru
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
@settings(deadline=None)
@given(trace=traces, capacity=capacities)
def test_victims_are_resident_and_not_in_use(
    make: type[Policy], trace: list[tuple[int, set[int]]], capacity: int
) -> None:
    def observe(layer: int, experts: set[int], victim: tuple[int, int], resident: Resident) -> None:
        assert victim in resident
        assert not (victim[0] == layer and victim[1] in experts)

    replay(make(), trace, capacity, observe)


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None)
@given(trace=traces, capacity=capacities)
def test_the_same_history_gives_the_same_victims(
    make: type[Policy], trace: list[tuple[int, set[int]]], capacity: int
) -> None:
    assert replay(make(), trace, capacity) == replay(make(), trace, capacity)


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None)
@given(trace=traces, layer=layer_numbers, keep=expert_sets)
def test_asking_changes_nothing_and_none_means_none(
    make: type[Policy], trace: list[tuple[int, set[int]]], layer: int, keep: set[int]
) -> None:
    policy = make()
    replay(policy, trace, LAYERS * EXPERTS)
    resident = {(number, expert) for number, experts in trace for expert in experts}
    victim = policy.victim(layer, keep)
    assert policy.victim(layer, keep) == victim
    assert (victim is None) == (resident <= {(layer, expert) for expert in keep})


@pytest.mark.parametrize("make", POLICIES)
@settings(deadline=None)
@given(trace=traces)
def test_everything_can_leave_one_after_the_other(
    make: type[Policy], trace: list[tuple[int, set[int]]]
) -> None:
    policy = make()
    replay(policy, trace, LAYERS * EXPERTS)
    left = {(number, expert) for number, experts in trace for expert in experts}
    while (victim := policy.victim(0, frozenset())) is not None:
        left.remove(victim)
        policy.remove(*victim)
    assert not left


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
        reads = sum(victim is not None for victim in replay(LayeredLru(), steps, capacity)) + capacity
        assert reads < 20 * 16 - 19 * (capacity - 2)  # all but two slots hit once a token from the second on

    @settings(deadline=None)
    @given(trace=traces, capacity=capacities)
    def test_the_victim_comes_from_a_largest_layer_with_something_to_give(
        self, trace: list[tuple[int, set[int]]], capacity: int
    ) -> None:
        def observe(layer: int, experts: set[int], victim: tuple[int, int], resident: Resident) -> None:
            sizes = [sum(number == candidate for number, _ in resident) for candidate in range(LAYERS)]
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
