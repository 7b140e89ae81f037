"""Watching the inputs of an engine's matrices while a text runs through it, and trying other weights in their place.

For calibration.  It stands between the blocks and the backend; the engine computes as ever while it only watches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from flashmoe.bundle.codecs import U8, FfnLayout, TileCodec
from flashmoe.engine.engine import Engine
from flashmoe.engine.experts import Pairs
from flashmoe.kernels.ops import U64
from flashmoe.nn.weights import F32, I32


class Watcher(Protocol):
    """Who hears of inputs; arrays are valid during the call only."""

    def matrix(self, name: str, x: F32) -> None:
        """x [tokens, cols] is multiplied with the matrix ``name`` of the bundle."""

    def record(self, name: str, x: F32) -> None:
        """x [tokens, hidden] goes through the feed-forward record ``name``."""

    def experts(self, layer: int, x: F32, chosen: I32) -> None:
        """x [tokens, hidden] goes through the experts chosen [tokens, k] of a layer."""


@dataclass(frozen=True)
class Tile:
    """A matrix to be tried: its bytes as the bundle would hold them."""

    data: U8
    codec: TileCodec
    rows: int
    cols: int


@dataclass(frozen=True)
class Trial:
    """Weights in the place of the bundle's own.

    matrices, records: by name.  layer: whose experts come from ``expert`` (record bytes of each), of shape ``layout``.
    """

    matrices: Mapping[str, Tile] = field(default_factory=dict)
    records: Mapping[str, tuple[U8, FfnLayout]] = field(default_factory=dict)
    layer: int | None = None
    layout: FfnLayout | None = None
    expert: Callable[[int], U8] | None = None


class Observer:
    """Attached to an engine until it is closed.  Not thread-safe; the engine must be used through one thread.

    ``watcher`` and ``trial`` may be set between two calls of the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.watcher: Watcher | None = None
        self._parts = engine._parts
        self._ops, self._names = self._parts.ops, self._parts.weights.handles
        self._linear, self._prepare = self._ops.linear, self._ops.prepare
        self._logits, self._ops.logits = self._ops.logits, self.logits
        self._expert_ffn, self._routed_ffn = self._ops.expert_ffn, self._ops.routed_ffn
        self._experts = self._parts.experts
        self._inputs: dict[int, F32] = {}  # of prepared inputs, by identity
        self._ops.linear, self._ops.prepare = self.linear, self.prepare
        self._ops.expert_ffn, self._ops.routed_ffn = self.expert_ffn, self.routed_ffn
        self._parts.experts = self  # type: ignore[assignment]
        self.set_trial(Trial())

    def set_trial(self, trial: Trial) -> None:
        """Compute with other weights from now on."""
        ops = self._ops
        self._trial = trial
        self._handles = {
            name: ops.weight(tile.data, tile.codec, tile.rows, tile.cols)
            for name, tile in trial.matrices.items()
        }
        self._records = {
            name: ops.ffn_weights(data, layout) for name, (data, layout) in trial.records.items()
        }

    def linear(
        self,
        x: F32,
        weights: Sequence[Any],
        outs: Sequence[F32],
        precise: bool = False,
        gated: bool = False,
    ) -> None:
        """See kernels.ops."""
        self._linear(x, [self._seen_matrix(weight, x) for weight in weights], outs, precise, gated)

    def logits(self, x: F32, weight: Any, out: F32) -> None:
        """See kernels.ops."""
        self._logits(x, self._seen_matrix(weight, x), out)

    def _seen_matrix(self, weight: Any, x: F32) -> Any:
        """The matrix as the trial has it, after the watcher has seen its input."""
        name = self._names.get(id(weight), "")
        if self.watcher is not None:
            self.watcher.matrix(name, x)
        return self._handles.get(name, weight)

    def prepare(self, input: Any, x: F32, group: int) -> None:
        """See kernels.ops."""
        self._inputs[id(input)] = x
        self._prepare(input, x, group)

    def expert_ffn(
        self,
        input: Any,
        layout: Any,
        addresses: Sequence[int],
        offsets: Sequence[int],
        tokens: I32,
        rows: I32,
        out: F32,
        weights: F32 | None = None,
        shared: tuple[Any, Any, int] | None = None,
    ) -> None:
        """See kernels.ops."""
        shared = self._seen_block(shared)
        self._expert_ffn(input, layout, addresses, offsets, tokens, rows, out, weights, shared)

    def routed_ffn(
        self,
        input: Any,
        layout: Any,
        addresses: U64,
        chosen: I32,
        weights: F32,
        out: F32,
        most_pairs: int,
        shared: tuple[Any, Any, int] | None = None,
        shared_weights: F32 | None = None,
    ) -> int:
        """See kernels.ops."""
        shared = self._seen_block(shared)
        return self._routed_ffn(
            input, layout, addresses, chosen, weights, out, most_pairs, shared, shared_weights
        )

    def _seen_block(self, shared: tuple[Any, Any, int] | None) -> tuple[Any, Any, int] | None:
        """The block of every token as the trial has it, after the watcher has seen its input."""
        if shared is None:
            return None
        name = self._names.get(shared[2], "")
        if self.watcher is not None:
            self.watcher.record(name, self._inputs[id(shared[0])])
        record = self._records.get(name)
        if record is None:
            return shared
        other = self._ops.token_input()
        self._prepare(other, self._inputs[id(shared[0])], record.group)
        return other, record.layout, record.address

    def run(
        self,
        layer: int,
        x: F32,
        chosen: I32,
        weights: F32,
        shared: Any,
        shared_weights: F32,
        out: F32,
        foresight: Any = None,
    ) -> None:
        """See nn.blocks.Experts."""
        if self.watcher is not None:
            self.watcher.experts(layer, x, chosen)
        if layer != self._trial.layer:
            self._experts.run(layer, x, chosen, weights, shared, shared_weights, out, foresight)
            return
        assert self._trial.layout is not None
        assert self._trial.expert is not None
        ops, layout, everyone = self._ops, self._trial.layout, np.arange(len(x), dtype=np.int32)
        out.fill(0)
        if shared is not None:
            block = ops.token_input()
            self.prepare(block, x, shared.group)
            whole = (block, shared.layout, shared.address)
            self.expert_ffn(
                block, shared.layout, [], [len(x)], everyone, everyone, out, shared_weights, whole
            )
        prepared, native = ops.token_input(), ops.ffn_layout(layout)
        self._prepare(prepared, x, layout.gate_up.group)
        pairs = Pairs(chosen, weights)
        for expert in pairs.experts:
            begin, end = pairs.range_of(expert)
            record, mine = self._trial.expert(expert), pairs.tokens[begin:end]
            factors = pairs.weights[begin:end]
            self._expert_ffn(prepared, native, [record.ctypes.data], [0, len(mine)], mine, mine, out, factors)
