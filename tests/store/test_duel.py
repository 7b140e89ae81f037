"""Streams on which one of the duellists is clearly worse, and one that turns from the one kind into the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from flashmoe.bench.replay import Material, Setting, replay
from flashmoe.store.policies.duel import LARGEST, MARGIN
from flashmoe.store.policies.registry import Geometry

LAYERS, EXPERTS, SLOTS, EACH = 4, 64, 12, 4
Event = tuple[int, list[int]]


def drifting(steps: int, seed: int) -> Iterator[Event]:
    """Each layer uses twelve experts for a while, then twelve others: what was used often is of no use any more."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        if step % 30 == 0:
            hot = [rng.choice(EXPERTS, SLOTS, replace=False) for _ in range(LAYERS)]
        for layer in range(LAYERS):
            yield layer, sorted(rng.choice(hot[layer], EACH, replace=False).tolist())


def scanned(steps: int, seed: int) -> Iterator[Event]:
    """Two of a layer's eight favourites, and two of all others in turn, which come too seldom to be worth a slot."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for layer in range(LAYERS):
            passing = [8 + (2 * step + i) % (EXPERTS - 8) for i in range(2)]
            yield layer, sorted([*rng.choice(8, 2, replace=False).tolist(), *passing])


def hits(name: str, events: list[Event]) -> int:
    """Of a pool for all layers, as the cache has it."""
    steps = [[experts for _, experts in events[i : i + LAYERS]] for i in range(0, len(events), LAYERS)]
    layers = tuple(range(LAYERS))
    material = Material(layers, steps, np.arange(len(steps)), [(0, len(steps))])
    return int(replay(material, name, Setting(SLOTS, "shared"), Geometry(layers, EXPERTS)).hits.sum())


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_lose_to_recency_where_that_is_right(seed: int) -> None:
    events = list(drifting(600, seed))
    recency = hits("lru", events)
    assert hits("lfu-decay", events) < recency - MARGIN
    assert hits("duel", events) >= recency


@pytest.mark.parametrize("seed", range(5))
def test_it_gains_what_frequencies_gain(seed: int) -> None:
    events = list(scanned(600, seed))
    recency, frequency = hits("lru", events), hits("lfu-decay", events)
    assert frequency > recency + 10 * MARGIN
    assert hits("duel", events) > recency + 0.9 * (frequency - recency)


@pytest.mark.parametrize("seed", range(5))
def test_when_the_workload_turns_it_follows(seed: int) -> None:
    events = [*scanned(300, seed), *drifting(600, seed)]
    best = hits("lru", events[: 300 * LAYERS]) + hits("lru", events[300 * LAYERS :])
    assert hits("duel", events) > best - LARGEST
    assert hits("duel", events) > hits("lru", events)
    assert hits("duel", events) > hits("lfu-decay", events)
