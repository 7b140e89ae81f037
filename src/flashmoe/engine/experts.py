"""Where store and kernels meet: running a layer's experts while the missing ones are still being read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from flashmoe.bundle.codecs import FfnLayout
from flashmoe.engine.lookahead import AHEAD, Lookahead
from flashmoe.kernels.cpu import CpuOps, FfnWeights
from flashmoe.nn.moe import Foresight
from flashmoe.nn.weights import F32, I32
from flashmoe.store.cache import ExpertCache
from flashmoe.store.slots import SlotArena

_MIN_SLOTS_AHEAD = 4  # times the experts of one step
# A prompt that asks this share of one layer's experts probably asks for nearly all of the next one's.
_READ_ON_SHARE = 0.75
_MAX_BATCH = 64  # experts of one call; more would only lengthen the wait for the first


class StreamedExperts:
    """Implements nn.moe.Experts over an expert cache.  Not thread-safe.

    One token: hits and the shared expert compute while misses load; results are kept apart and summed at the
    end.  Several tokens: each needed expert is visited once, in file order, and serves all its tokens.  Both sum
    shared expert first, then ascending expert number, with one fused multiply-add each: the same bits.
    """

    def __init__(
        self,
        ops: CpuOps,
        cache: ExpertCache,
        arena: SlotArena,
        layouts: dict[int, FfnLayout],
        lookahead: str = "auto",
        experts: int = 0,
    ) -> None:
        """layouts: layer -> layout of its records; experts: of each layer."""
        self._ops, self._cache = ops, cache
        # A small pool cannot lend slots: what it holds for the step would leave.
        small = arena.count < _MIN_SLOTS_AHEAD * max(AHEAD, cache.experts_per_token)
        self.lookahead = Lookahead(cache, "off" if small else lookahead)
        self._everyone, self._successor = range(experts), dict(itertools.pairwise(layouts))
        self._base, self._stride = arena.address, arena.record_nbytes
        self._layouts = {
            layer: (ops.ffn_layout(layout), layout.gate_up.group) for layer, layout in layouts.items()
        }
        self._inputs = {group: ops.token_input() for group in (32, 64)}
        self._rows = np.arange(1, dtype=np.int32)
        self._y: F32 = np.empty((0, 0), np.float32)

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
        """See nn.moe.Experts."""
        layout, group = self._layouts[layer]
        for needed in {group, shared.group}:
            self._ops.prepare(self._inputs[needed], x, needed)
        if x.shape[0] == 1:
            self._one_token(layer, layout, group, chosen, weights, shared, shared_weights, out, foresight)
        else:
            self._many_tokens(layer, layout, group, chosen, weights, shared, shared_weights, out)

    def _one_token(
        self,
        layer: int,
        layout: Any,
        group: int,
        chosen: I32,
        weights: F32,
        shared: FfnWeights,
        shared_weights: F32,
        out: F32,
        foresight: Foresight | None,
    ) -> None:
        ops, k, lookahead = self._ops, chosen.shape[1], self.lookahead
        if self._y.shape != (k + 1, out.shape[1]):
            self._y = np.empty((k + 1, out.shape[1]), np.float32)
            self._rows = np.arange(k + 1, dtype=np.int32)
            self._zeros = np.zeros(k + 1, np.int32)
            self._factors = np.empty(k + 1, np.float32)
        order = chosen[0].argsort()
        experts = chosen[0][order].tolist()
        block = (self._inputs[shared.group], shared.layout, shared.address)
        self._factors[0] = shared_weights[0]
        self._factors[1:] = weights[0][order]
        out.fill(0)
        lookahead.judge(layer, experts)
        with self._cache.request(layer, experts) as request:
            if len(request.hits) == k:  # nothing to wait for: summed on the way
                lookahead.guess(foresight)
                lookahead.read(request)
                self._run_ready(layout, group, experts, request.hits, block, self._zeros, out, self._factors)
                return
            self._run_ready(layout, group, experts, request.hits, block, self._rows, self._y)
            lookahead.guess(foresight)
            while ready := request.next_ready():
                lookahead.read(request)
                self._run_ready(layout, group, experts, ready, None, self._rows, self._y)
        ops.combine(self._y, self._zeros, self._factors, out)

    def _run_ready(
        self,
        layout: Any,
        group: int,
        experts: list[int],
        ready: list[tuple[int, int]],
        shared: Any,
        rows: I32,
        out: F32,
        factors: F32 | None = None,
    ) -> None:
        """One call for these experts, and for the shared block if given; expert i's result goes to rows[1 + i]."""
        addresses = [self._base + slot * self._stride for _, slot in ready]
        first = 0 if shared is None else 1
        mine = [0] * first + [1 + experts.index(expert) for expert, _ in ready]
        n = len(mine)
        offsets = list(range(first, n + 1))
        self._ops.expert_ffn(
            self._inputs[group], layout, addresses, offsets, self._zeros[:n], rows[mine], out, factors, shared
        )

    def _many_tokens(
        self,
        layer: int,
        layout: Any,
        group: int,
        chosen: I32,
        weights: F32,
        shared: FfnWeights,
        shared_weights: F32,
        out: F32,
    ) -> None:
        ops, (count, k) = self._ops, chosen.shape
        everyone = np.arange(count, dtype=np.int32)
        out.fill(0)
        block = (self._inputs[shared.group], shared.layout, shared.address)
        everyone_first = [count]
        ops.expert_ffn(
            self._inputs[group], layout, [], everyone_first, everyone, everyone, out, shared_weights, block
        )
        pairs = chosen.ravel().argsort(kind="stable")
        tokens = (pairs // k).astype(np.int32)
        factors = weights.ravel()[pairs]
        experts, starts = np.unique(chosen.ravel()[pairs], return_index=True)
        bounds = [*starts.tolist(), count * k]
        # The stream keeps the order of its experts, so the i-th one owns the i-th range of pairs.
        done = 0
        then = None
        if layer in self._successor and len(experts) >= _READ_ON_SHARE * len(self._everyone):
            then = self._successor[layer], self._everyone
        for batch in self._cache.stream(layer, experts.tolist(), _MAX_BATCH, then):
            for ready in _parts(batch, bounds, done, count):
                ends = bounds[done : done + len(ready) + 1]
                begin, end = ends[0], ends[-1]
                mine = tokens[begin:end]
                ops.expert_ffn(
                    self._inputs[group],
                    layout,
                    [self._base + slot * self._stride for _, slot in ready],
                    [bound - begin for bound in ends],
                    mine,
                    mine,
                    out,
                    factors[begin:end],
                )
                done += len(ready)


def _parts(
    batch: list[tuple[int, int]], bounds: list[int], first: int, limit: int
) -> Iterator[list[tuple[int, int]]]:
    """Cuts a batch where its pairs would exceed `limit`, so that a call's workspace stays below two chunks."""
    begin = 0
    for i in range(1, len(batch) + 1):
        if i == len(batch) or bounds[first + i + 1] - bounds[first + begin] > limit:
            yield batch[begin:i]
            begin = i
