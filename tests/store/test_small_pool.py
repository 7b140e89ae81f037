"""A pool below one token's working set (layers x k): plain LRU never hits there, layered LRU does."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from flashmoe.store.cache import ExpertCache
from flashmoe.store.fake_reader import FakeReader
from flashmoe.store.policies import LayeredLru, Policy
from flashmoe.store.slots import SlotArena

RECORD, LAYERS, EXPERTS, K, TOKENS = 4096, 8, 16, 2, 40
WORKING_SET = LAYERS * K


class PlainLru:
    """Least recently used over all layers at once, as a page cache would have it."""

    def __init__(self) -> None:
        self._order: dict[tuple[int, int], None] = {}

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        for key in ((layer, expert) for expert in experts):
            if key in self._order:
                del self._order[key]
                self._order[key] = None

    def insert(self, layer: int, expert: int) -> None:
        self._order[layer, expert] = None

    def remove(self, layer: int, expert: int) -> None:
        del self._order[layer, expert]

    def victim(self, layer: int, keep: frozenset[int] | set[int]) -> tuple[int, int] | None:
        return next((key for key in self._order if key[0] != layer or key[1] not in keep), None)

    def refresh(self) -> None:
        pass


def hit_rate(policy: Policy, slots: int, tokens: list[list[list[int]]]) -> float:
    """Of decoding tokens[token][layer] = experts with a cache of so many slots."""
    reader = FakeReader([bytes(EXPERTS * RECORD)] * LAYERS)
    layers = {layer: (layer, RECORD) for layer in range(LAYERS)}
    cache = ExpertCache(reader, SlotArena(slots, RECORD), policy, layers, experts_per_token=K)
    for token in tokens:
        for layer, experts in enumerate(token):
            with cache.request(layer, experts) as request:
                while request.next_ready():
                    pass
    rate = cache.stats().total.hit_rate
    assert rate is not None
    return rate


def same_experts() -> list[list[list[int]]]:
    """Every token asks for what the one before asked for: the easiest trace that there is."""
    return [[[3, 7]] * LAYERS] * TOKENS


def skewed_experts() -> list[list[list[int]]]:
    """Each layer has two favourites, which a token asks for with even chances."""
    rng = random.Random(4)
    return [
        [sorted({0, 1} if rng.random() < 0.5 else set(rng.sample(range(EXPERTS), K))) for _ in range(LAYERS)]
        for _ in range(TOKENS)
    ]


@pytest.mark.parametrize("slots", [K, LAYERS // 2, LAYERS, WORKING_SET - 2])
def test_where_plain_lru_never_hits_layered_lru_does(slots: int) -> None:
    assert hit_rate(PlainLru(), slots, same_experts()) == 0
    # All but the k slots that the layer at hand reads into hit once a token, from the second one on.
    expected = (slots - K) / WORKING_SET * (TOKENS - 1) / TOKENS
    assert hit_rate(LayeredLru(), slots, same_experts()) >= expected
    if slots > K:
        assert hit_rate(LayeredLru(), slots, same_experts()) > 0


def test_the_cliff_is_one_tokens_working_set() -> None:
    assert hit_rate(PlainLru(), WORKING_SET - K, same_experts()) == 0
    assert hit_rate(PlainLru(), WORKING_SET, same_experts()) == (TOKENS - 1) / TOKENS
    assert hit_rate(LayeredLru(), WORKING_SET, same_experts()) == (TOKENS - 1) / TOKENS


def test_routing_with_favourites_hits_in_a_small_pool() -> None:
    trace = skewed_experts()
    plain, layered = (hit_rate(policy, LAYERS, trace) for policy in (PlainLru(), LayeredLru()))
    assert plain == 0
    assert layered > 0.1
