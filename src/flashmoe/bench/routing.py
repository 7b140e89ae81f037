"""A recorded trace in the place of the routers: random weights then ask for experts as a trained model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.engine.engine import Engine
from flashmoe.errors import ConfigError
from flashmoe.nn.blocks import Experts, Foresight
from flashmoe.nn.weights import F32, I32
from flashmoe.store.policies.registry import Geometry
from flashmoe.store.trace import Trace
from flashmoe.store.trace_writer import TraceWriter


def onto(trace: Trace, geometry: Geometry) -> Trace:
    """The trace as if another model had been recorded.

    Layer i takes the trace's i-th one, again from the first when those end; expert e of E becomes e * experts // E, so
    that they lie spread over the files.  Raises ConfigError when the model has fewer experts than the trace.
    """
    if trace.experts > geometry.experts:
        raise ConfigError(
            f"{trace.path}: routes to {trace.experts} experts and the bundle has {geometry.experts}: "
            "give a trace of a model with fewer"
        )
    layers = np.arange(len(geometry.layers)) % len(trace.layers)
    spread = np.arange(trace.experts) * geometry.experts // trace.experts
    weights = trace.router_weights
    return replace(
        trace,
        expert_ids=spread.astype(np.uint16)[trace.expert_ids[:, layers]],
        router_weights=None if weights is None else weights[:, layers],
        layers=geometry.layers,
        experts=geometry.experts,
        model=geometry.identity,
    )


def cut(trace: Trace, tokens: int) -> Trace:
    """So many tokens, of whole sequences that lie evenly over the trace; the last of them is cut.

    Raises ConfigError when there are fewer.
    """
    starts = trace.sequence_starts()
    lengths = np.diff(np.r_[starts, trace.tokens])
    for count in range(max(1, tokens // int(lengths.max())), len(starts) + 1):
        chosen = np.arange(count) * len(starts) // count
        if lengths[chosen].sum() >= tokens:
            rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in chosen])
            return trace.select(rows[:tokens])
    raise ConfigError(f"{trace.path}: {trace.tokens} tokens are fewer than {tokens}: ask for fewer --tokens")


def save_trace(trace: Trace, path: Path) -> None:
    """As `--record-trace` would have written it: every token a step of its own."""
    writer = TraceWriter(path, trace.layers, trace.experts, trace.per_token, trace.model)
    starts = set(trace.sequence_starts().tolist())
    position = 0
    unknown = np.zeros((1, trace.per_token), np.float16)
    for i, token in enumerate(trace.token_ids.tolist()):
        position = 0 if i in starts else position + 1
        writer.begin([(0, position, [token])])
        for place, layer in enumerate(trace.layers):
            weights = unknown if trace.router_weights is None else trace.router_weights[i, place][None]
            writer.layer(layer, trace.expert_ids[i, place][None], weights)
    writer.close()


class ReplayedRouting:
    """Stands between the blocks and the experts of an engine from now on: its routers choose what a trace says.

    Routers are computed as ever and the weights are theirs.  Nothing is read ahead, since what the next router would
    pick is not what it will be made to pick.  `token`, the trace's token at hand, is set before each step of one token.
    """

    def __init__(self, engine: Engine, trace: Trace) -> None:
        parts = engine._parts
        self._experts: Experts = parts.experts
        self._ids = trace.expert_ids.astype(np.int32)
        self._index = {layer: i for i, layer in enumerate(trace.layers)}
        self.token = 0
        parts.experts = self  # type: ignore[assignment]

    def run(
        self,
        layer: int,
        x: F32,
        chosen: I32,
        weights: F32,
        shared: Any,
        shared_weights: F32,
        out: F32,
        foresight: Foresight | None = None,
    ) -> None:
        """See nn.blocks.Experts."""
        chosen[:] = self._ids[self.token, self._index[layer]]
        self._experts.run(layer, x, chosen, weights, shared, shared_weights, out, None)
