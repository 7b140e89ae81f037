"""Where store and kernels meet: running a layer's experts while the missing ones are still being read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from flashmoe.bundle.codecs import FfnLayout
from flashmoe.engine.lookahead import TAIL, Lookahead, reads_ahead
from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import U64
from flashmoe.nn.blocks import Foresight
from flashmoe.nn.moe import FEW
from flashmoe.nn.weights import F32, I32
from flashmoe.store.cache import ExpertCache
from flashmoe.store.slots import SlotArena
from flashmoe.store.trace_writer import TraceWriter
from flashmoe.store.usage import UsageCounts

# A prompt that asks this share of one layer's experts probably asks for nearly all of the next one's.
READ_ON_SHARE = 0.75
_MAX_BATCH = 64  # experts of one call; more would only lengthen the wait for the first


class Pairs:
    """The (token, expert) pairs of a call, by ascending expert and then token.

    tokens int32, weights [pairs]; experts: the distinct ones; expert i owns the pairs bounds[i] to bounds[i + 1].
    """

    __slots__ = ("_index", "bounds", "experts", "rows", "tokens", "weights")

    def __init__(self, chosen: I32, weights: F32) -> None:
        count, k = chosen.shape
        flat = chosen.ravel()
        order = flat.argsort(kind="stable")
        self.weights: F32 = weights.ravel()[order]
        if count == 1:  # numpy's unique would cost 10 us a layer
            self.tokens: I32 = np.zeros(k, np.int32)
            self.experts: list[int] = flat[order].tolist()
            self.bounds = list(range(k + 1))
        else:
            self.tokens = (order // k).astype(np.int32)
            experts, starts = np.unique(flat[order], return_index=True)
            self.experts = experts.tolist()
            self.bounds = [*starts.tolist(), count * k]
        self.rows: I32 = np.arange(count, count * (k + 1), dtype=np.int32)
        self._index = {expert: i for i, expert in enumerate(self.experts)}

    def range_of(self, expert: int) -> tuple[int, int]:
        """The expert's pairs."""
        i = self._index[expert]
        return self.bounds[i], self.bounds[i + 1]


class StreamedExperts:
    """Implements nn.blocks.Experts over an expert cache.  Not thread-safe.

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
        usage: UsageCounts | None = None,
        recorder: TraceWriter | None = None,
        most_pairs: int = 2048,
    ) -> None:
        """layouts: layer -> layout of its records; experts: of each layer; usage: counts what is asked for.

        recorder: hears what routers pick.  most_pairs: computed together where no read has to be waited for; the plan
        of memory has room for those of a prefill chunk.
        """
        self._ops, self._cache, self._usage, self._recorder = ops, cache, usage, recorder
        self.lookahead = Lookahead(cache, lookahead)
        self._every_expert, self._successor = range(experts), dict(itertools.pairwise(layouts))
        self._everyone, self._slots = np.arange(FEW, dtype=np.int32), arena.count
        self._base, self._stride = arena.address, arena.record_nbytes
        self._addresses: dict[int, U64] = {}  # layer -> its records, while every expert is in memory
        self._most_pairs = most_pairs
        self._layouts = {
            layer: (ops.ffn_layout(layout), layout.gate_up.group) for layer, layout in layouts.items()
        }
        self._inputs = {group: ops.token_input() for group in (32, 64)}
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
        """See nn.blocks.Experts."""
        if self._recorder is not None:
            self._recorder.layer(layer, chosen, weights)
        layout, group = self._layouts[layer]
        if self._usage is not None:
            self._usage.add(layer, chosen)
        for needed in {group, group if shared is None else shared.group}:
            self._ops.prepare(self._inputs[needed], x, needed)
        out.fill(0)
        block = None
        if shared is not None:
            block = (self._inputs[shared.group], shared.layout, shared.address)
        else:
            shared_weights = shared_weights[:0]
        if self._cache.whole:
            self._resident(layer, layout, group, chosen, weights, block, shared_weights, out)
            return
        self._addresses.clear()  # what leaves may come back elsewhere
        pairs = Pairs(chosen, weights)
        # A request holds all its experts at once; a pool that it would fill serves a prompt's stream better.
        if len(x) == 1 or (len(x) <= FEW and 2 * len(pairs.experts) <= self._slots):
            self._few_tokens(layer, layout, group, pairs, block, shared_weights, out, foresight)
        else:
            self._many_tokens(layer, layout, group, pairs, block, shared_weights, out)

    def _resident(
        self,
        layer: int,
        layout: Any,
        group: int,
        chosen: I32,
        weights: F32,
        block: tuple[Any, Any, int] | None,
        shared_weights: F32,
        out: F32,
    ) -> None:
        """Every expert is in memory: nothing to read, to guess or to keep apart, and the kernel groups the pairs.

        What the interpreter touches stands in memory, not in a cache, after each layer's weights: 0.3 ms a layer with
        eight tokens, where it takes 0.06 while it is warm.
        """
        addresses = self._addresses.get(layer)
        if addresses is None:
            addresses = self._addresses[layer] = self._places(layer)
        distinct = self._ops.routed_ffn(
            self._inputs[group],
            layout,
            addresses,
            chosen,
            weights,
            out,
            len(chosen) * chosen.shape[1] if len(chosen) <= FEW else self._most_pairs,
            block,
            None if block is None else shared_weights,
        )
        self._cache.hit(layer, chosen, distinct)

    def _places(self, layer: int) -> U64:
        """Address of each expert's record."""
        resident = self._cache.resident(layer)
        slots = np.array([resident[expert] for expert in range(len(resident))], np.uint64)
        return self._base + slots * np.uint64(self._stride)

    def _few_tokens(
        self,
        layer: int,
        layout: Any,
        group: int,
        pairs: Pairs,
        block: tuple[Any, Any, int] | None,
        shared_weights: F32,
        out: F32,
        foresight: Foresight | None,
    ) -> None:
        """Experts are computed as they land; results are kept apart and summed in the end, in their order."""
        ops, lookahead, tokens = self._ops, self.lookahead, len(out)
        everyone, experts = self._everyone[: len(shared_weights)], pairs.experts
        rows = np.concatenate([everyone, pairs.tokens])
        factors = np.concatenate([shared_weights, pairs.weights])
        if not (reads_ahead(self._slots, len(experts)) and self._reads_for_next(layer)):
            foresight = None  # a small pool cannot lend slots: what it holds for the step would leave
        lookahead.judge(layer, experts)
        with self._cache.request(layer, experts) as request:
            waits = request.outstanding > TAIL
            if not waits:  # the drive would be idle while the hits are computed
                lookahead.guess(foresight, tokens)
                lookahead.read(request)
            if len(request.hits) == len(experts):  # nothing to wait for: summed on the way
                addresses = [self._base + slot * self._stride for _, slot in request.hits]
                offsets = [len(everyone) + bound for bound in pairs.bounds]
                ops.expert_ffn(
                    self._inputs[group], layout, addresses, offsets, rows, rows, out, factors, block
                )
                return
            y = self._results(tokens + len(pairs.tokens), out.shape[1])
            self._run_ready(layout, group, pairs, request.hits, everyone, block, y)
            if foresight is not None and waits:
                known = functools.partial(
                    self._so_far, pairs, request.hits, y, len(everyone), rows, factors, out
                )
                lookahead.guess(foresight, tokens, known)
                lookahead.read(request)
            while ready := request.next_ready():
                self._run_ready(layout, group, pairs, ready, everyone[:0], None, y)
        ops.combine(y[tokens - len(everyone) :], rows, factors, out)

    def _so_far(
        self,
        pairs: Pairs,
        ready: list[tuple[int, int]],
        y: F32,
        shared: int,
        rows: I32,
        factors: F32,
        out: F32,
    ) -> F32:
        """The sum of the shared expert and of those that are ready: a better guess than without."""
        missing, added = np.ones(len(factors), bool), np.zeros_like(out)
        missing[:shared] = False
        for expert, _ in ready:
            begin, end = pairs.range_of(expert)
            missing[shared + begin : shared + end] = False
        results, known = y[len(out) - shared :], factors.copy()
        results[: len(factors)][missing] = 0  # what is left there of another layer may be no number
        known[missing] = 0
        self._ops.combine(results, rows, known, added)
        return added

    def _reads_for_next(self, layer: int) -> bool:
        """Whether the next layer may miss: asking its router in vain took 3 % of a token with all experts in memory."""
        then = self._successor.get(layer)
        return then is not None and len(self._cache.resident_experts(then)) < len(self._every_expert)

    def _run_ready(
        self,
        layout: Any,
        group: int,
        pairs: Pairs,
        ready: list[tuple[int, int]],
        shared: I32,
        block: Any,
        y: F32,
    ) -> None:
        """One call for these experts, and for the tokens `shared` of the shared block; pair p's result is y[T + p]."""
        offsets, tokens, rows = [len(shared)], [shared], [shared]
        for expert, _ in ready:
            begin, end = pairs.range_of(expert)
            offsets.append(offsets[-1] + end - begin)
            tokens.append(pairs.tokens[begin:end])
            rows.append(pairs.rows[begin:end])
        addresses = [self._base + slot * self._stride for _, slot in ready]
        self._ops.expert_ffn(
            self._inputs[group],
            layout,
            addresses,
            offsets,
            np.concatenate(tokens),
            np.concatenate(rows),
            y,
            None,
            block,
        )

    def _results(self, rows: int, width: int) -> F32:
        if self._y.shape[0] < rows or self._y.shape[1] != width:
            self._y = np.empty((rows, width), np.float32)
        return self._y

    def _many_tokens(
        self,
        layer: int,
        layout: Any,
        group: int,
        pairs: Pairs,
        block: tuple[Any, Any, int] | None,
        shared_weights: F32,
        out: F32,
    ) -> None:
        ops, count = self._ops, len(out)
        if block is not None:
            everyone = np.arange(count, dtype=np.int32)
            ops.expert_ffn(
                self._inputs[group], layout, [], [count], everyone, everyone, out, shared_weights, block
            )
        experts, bounds, tokens = pairs.experts, pairs.bounds, pairs.tokens
        # The stream keeps the order of its experts, so the i-th one owns the i-th range of pairs.
        done = 0
        then = None
        if layer in self._successor and len(experts) >= READ_ON_SHARE * len(self._every_expert):
            then = self._successor[layer], self._every_expert
        for batch in self._cache.stream(layer, experts, _MAX_BATCH, then):
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
                    pairs.weights[begin:end],
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
