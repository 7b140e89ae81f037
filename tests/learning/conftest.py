"""Traces with something to learn in them."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe.store.trace import Trace, read_trace


@pytest.fixture(scope="session")
def linked_trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Topics come and go; each has experts of its own, all equally often used, so their own history tells little."""
    rng, tokens, layers, experts, k = np.random.default_rng(3), 3000, 3, 16, 2
    topics = np.stack([rng.permutation(experts).reshape(4, 4) for _ in range(layers)])
    ids = np.zeros((tokens, layers, k), np.uint8)
    topic = 0
    for t in range(tokens):
        if rng.random() < 0.3:
            topic = (topic + 1) % 4  # what comes after a topic is certain, when is not
        for layer in range(layers):
            ids[t, layer] = rng.permutation(topics[layer, topic])[:k]
    path = tmp_path_factory.mktemp("trace") / "linked.npz"
    np.savez(path, expert_ids=ids, sequence_id=np.arange(tokens) // 300)
    return read_trace(path)
