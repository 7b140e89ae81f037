"""A backend in numpy: slow, obvious, float64 inside.  Tests compare every other backend with it.

A model runs on it unchanged, some thousand times slower than on the native one.  Arguments are trusted, except where
numpy itself objects: a broken shape is the caller's bug.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bundle.codecs import TILE_ROWS, U8, DenseCodec, FfnLayout, TileCodec
from flashmoe.errors import ConfigError
from flashmoe.kernels.kv_cache import Cache, load_keys, load_values, store_keys, store_values
from flashmoe.kernels.ops import F32, I32, U64
from flashmoe.kernels.reference_delta import delta_inputs, recurrent
from flashmoe.kernels.reference_quant import (
    F64,
    SURE_TILES,
    ReferenceInput,
    ReferenceRecord,
    ReferenceWeight,
    coarse_limit,
    feed_forward,
    sigmoid,
)


class ReferenceOps:
    """All operations of kernels/ops.py; see there for shapes and mathematics.

    activations: "int8" sees quantised inputs as the fast path does, "f32" the inputs themselves.
    Raises ConfigError for anything else.  Stateless, hence thread-safe.
    """

    def __init__(self, activations: str = "int8") -> None:
        if activations not in ("int8", "f32"):
            raise ConfigError(f"unknown activations {activations!r}: choose one of int8, f32")
        self._int8 = activations == "int8"

    scratch_nbytes = 0

    # Weights

    def weight(
        self, data: U8, codec: TileCodec | DenseCodec, rows: int, cols: int, bias: F32 | None = None
    ) -> ReferenceWeight:
        """A matrix over its bytes."""
        return ReferenceWeight(data, codec, rows, cols, bias)

    def ffn_layout(self, layout: FfnLayout) -> FfnLayout:
        """The layout itself."""
        return layout

    def ffn_weights(self, data: U8, layout: FfnLayout) -> ReferenceRecord:
        """A record in memory."""
        return ReferenceRecord(layout, data.ctypes.data, data)

    def token_input(self) -> ReferenceInput:
        """An empty input."""
        return ReferenceInput()

    def read_bandwidth(self, data: U8) -> float:
        """Bytes per second of one numpy reduction."""
        began = time.perf_counter()
        data.max(initial=0)
        return data.nbytes / max(time.perf_counter() - began, 1e-9)

    # Products

    def linear(
        self,
        x: F32,
        weights: Sequence[ReferenceWeight],
        outs: Sequence[F32],
        precise: bool = False,
        gated: bool = False,
    ) -> None:
        """See Ops."""
        for weight, out in zip(weights, outs, strict=True):
            out.reshape(len(x), weight.rows)[...] = weight.product(
                x, coarse_limit(precise, gated), self._int8
            )

    def logits(self, x: F32, weight: ReferenceWeight, out: F32) -> None:
        """See Ops."""
        y = weight.product(x, coarse_limit(precise=False), self._int8)
        sure = weight.product(x, coarse_limit(precise=True), self._int8)
        tiles = np.full((len(x), -(-weight.rows // TILE_ROWS) * TILE_ROWS), -np.inf)
        tiles[:, : weight.rows] = y
        order = (-tiles.reshape(len(x), -1, TILE_ROWS).max(-1)).argsort(-1, kind="stable")
        for t, chosen in enumerate(order[:, :SURE_TILES]):
            rows = (chosen[:, None] * TILE_ROWS + np.arange(TILE_ROWS)).ravel()
            rows = rows[rows < weight.rows]
            y[t, rows] = sure[t, rows]
        out.reshape(y.shape)[...] = y

    def head_linear(self, x: F32, weight: ReferenceWeight, out: F32, precise: bool = False) -> None:
        """See Ops."""
        heads, rows = x.shape[1], weight.rows // x.shape[1]
        values = weight.values.astype(np.float64).reshape(heads, rows, weight.cols)
        for h in range(heads):
            source = weight.seen(
                np.ascontiguousarray(x[:, h, : weight.cols]), coarse_limit(precise), self._int8
            )
            out[:, h, :rows] = source @ values[h].T
            if weight.bias is not None:
                out[:, h, :rows] += weight.bias[h * rows : (h + 1) * rows]

    def embed(self, table: ReferenceWeight, ids: I32, out: F32) -> None:
        """See Ops."""
        out.reshape(len(ids), table.cols)[...] = table.values[ids]

    def prepare(self, input: ReferenceInput, x: F32, group: int) -> None:
        """See Ops."""
        input.x, input.group = x, group

    def expert_ffn(
        self,
        input: ReferenceInput,
        layout: FfnLayout,
        addresses: Sequence[int],
        offsets: Sequence[int],
        tokens: I32,
        rows: I32,
        out: F32,
        weights: F32 | None = None,
        shared: tuple[ReferenceInput, FfnLayout, int] | None = None,
    ) -> None:
        """See Ops."""
        jobs = [(input, layout, address, False) for address in addresses]
        bounds = list(offsets)
        if shared is not None:
            jobs.insert(0, (*shared, True))
            bounds.insert(0, 0)
        out = out.reshape(-1, layout.hidden)
        for (source, shape, address, precise), (begin, end) in zip(jobs, pairwise(bounds), strict=True):
            assert source.x is not None
            y = feed_forward(source.x[tokens[begin:end]], shape, address, precise, self._int8)
            if weights is None:
                out[rows[begin:end]] = y
            else:
                self.combine(y, rows[begin:end], weights[begin:end], out)

    def routed_ffn(
        self,
        input: ReferenceInput,
        layout: FfnLayout,
        addresses: U64,
        chosen: I32,
        weights: F32,
        out: F32,
        most_pairs: int,
        shared: tuple[ReferenceInput, FfnLayout, int] | None = None,
        shared_weights: F32 | None = None,
    ) -> int:
        """See Ops."""
        everyone = np.arange(len(chosen), dtype=np.int32)
        if shared is not None:
            self.expert_ffn(input, layout, [], [len(chosen)], everyone, everyone, out, shared_weights, shared)
        experts = np.unique(chosen)
        for expert in experts:
            tokens, places = np.nonzero(chosen == expert)
            rows, address = tokens.astype(np.int32), int(addresses[expert])
            self.expert_ffn(
                input, layout, [address], [0, len(rows)], rows, rows, out, weights[tokens, places]
            )
        return len(experts)

    def combine(self, y: F32 | F64, rows: I32, weights: F32, out: F32) -> None:
        """See Ops; one rounding a step, as a fused multiply-add has."""
        for values, row, weight in zip(y, rows, weights, strict=False):
            out[row] = np.float64(weight) * values + out[row]

    # Between the products

    def sigmoid(self, x: F32, out: F32) -> None:
        """See Ops."""
        out.reshape(x.shape)[...] = sigmoid(x.astype(np.float64))

    def rms_norm(self, x: F32, w: F32, eps: float, out: F32) -> None:
        """See Ops."""
        out.reshape(x.shape)[...] = _normalised(x, eps) * w

    def add_rms_norm(self, x: F32, delta: F32, w: F32, eps: float, out: F32) -> None:
        """See Ops."""
        x += delta.reshape(x.shape)
        self.rms_norm(x, w, eps, out)

    def gated_rms_norm(self, o: F32, z: F32, w: F32, eps: float, out: F32) -> None:
        """See Ops."""
        gate = z.astype(np.float64).reshape(-1, len(w))
        normed = _normalised(o.reshape(-1, len(w)), eps) * w
        out.reshape(-1, len(w))[...] = normed * gate * sigmoid(gate)

    def causal_conv1d(self, u: F32, w: F32, states: Sequence[F32], ends: Sequence[int], out: F32) -> None:
        """See Ops."""
        for state, begin, end in zip(states, [0, *ends], ends, strict=False):
            rows = np.concatenate([state, u[begin:end]])
            for t in range(end - begin):
                total = (rows[t : t + len(w)].astype(np.float64) * w).sum(0)
                out[begin + t] = total * sigmoid(total)
            state[...] = rows[end - begin :]

    def gated_delta_rule(
        self,
        mixed: F32,
        a: F32,
        b: F32,
        a_log: F32,
        dt_bias: F32,
        states: Sequence[F32],
        ends: Sequence[int],
        out: F32,
        key_heads: int,
    ) -> None:
        """See Ops."""
        for state, begin, end in zip(states, [0, *ends], ends, strict=False):
            own = slice(begin, end)
            inputs = delta_inputs(mixed[own], a[own], b[own], a_log, dt_bias, state.shape, key_heads)
            result, after = recurrent(inputs, state.astype(np.float64))
            out.reshape(-1, *result.shape[1:])[own] = result
            state[...] = after

    def attention_prepare(
        self,
        q_gate: F32,
        k: F32,
        v: F32,
        q_norm: F32 | None,
        k_norm: F32 | None,
        eps: float,
        cos: F32,
        sin: F32,
        position: int,
        q_out: F32,
        keys: Cache,
        values: Cache,
    ) -> None:
        """See Ops."""
        tokens, heads, dim = q_out.shape
        new = slice(position, position + tokens)
        angles = cos[new].astype(np.float64)[:, None], sin[new].astype(np.float64)[:, None]
        queries = q_gate.reshape(tokens, heads, -1, dim)[:, :, 0]
        q_out[...] = _rotated(_with_norm(queries, q_norm, eps), *angles)
        rotated = _rotated(_with_norm(k.reshape(tokens, -1, dim), k_norm, eps), *angles)
        # Through float32, as any backend computes it: float16 then rounds the same number.
        store_keys(keys, position, rotated.astype(np.float32))
        store_values(values, position, v.reshape(tokens, -1, dim))

    def attention(
        self,
        q: F32,
        keys: Cache,
        values: Cache,
        position: int,
        q_gate: F32 | None,
        out: F32,
        window: int = 0,
        sinks: F32 | None = None,
    ) -> None:
        """See Ops."""
        tokens, heads, dim = q.shape
        gate = np.ones((tokens, heads, dim))
        if q_gate is not None:
            gate = sigmoid(q_gate.reshape(tokens, heads, 2, dim)[:, :, 1].astype(np.float64))
        result = out.reshape(tokens, heads, dim)
        all_keys, all_values = load_keys(keys, dim), load_values(values, dim)
        for t in range(tokens):
            for h in range(heads):
                kv_head = h // (heads // len(keys))
                end = position + t + 1
                visible = slice(max(0, end - window) if window else 0, end)
                scores = all_keys[kv_head, visible] @ q[t, h] / np.sqrt(dim)
                sink = [] if sinks is None else [sinks[h]]
                weights = _softmax(np.append(scores, sink))[: len(scores)]
                result[t, h] = weights @ all_values[kv_head, visible] * gate[t, h]

    def mla_prepare(
        self,
        q: F32,
        latents: F32,
        norm: F32,
        eps: float,
        cos: F32,
        sin: F32,
        interleaved: bool,
        position: int,
        q_out: F32,
        cache: Cache,
    ) -> None:
        """See Ops."""
        tokens, rank, turned = len(q), len(norm), 2 * cos.shape[1]
        new = slice(position, position + tokens)
        angles = cos[new].astype(np.float64)[:, None], sin[new].astype(np.float64)[:, None]

        def rotated(x: F32) -> F64:
            pairs = np.concatenate([x[..., 0::2], x[..., 1::2]], -1) if interleaved else x
            return _rotated(pairs.astype(np.float64), *angles)

        rows = latents.reshape(tokens, 1, -1)
        q_out[..., rank:] = rotated(q[..., q.shape[2] - turned :])
        normed = _normalised(rows[..., :rank], eps) * norm
        store_values(
            cache, position, np.concatenate([normed, rotated(rows[..., rank:])], -1).astype(np.float32)
        )

    def mla_attention(self, q: F32, cache: Cache, position: int, scale: float, out: F32) -> None:
        """See Ops."""
        keys = load_values(cache, q.shape[2])[0]
        for t in range(len(q)):
            visible = keys[: position + t + 1]
            out[t] = _softmax(q[t] @ visible.T * scale) @ visible[:, : out.shape[2]]

    def route(self, logits: F32, k: int, chosen: I32, weights: F32, renormalise: bool = True) -> None:
        """See Ops."""
        if np.isnan(logits).any():
            raise RuntimeError("the router computed a value that is not a number")
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]  # stable: the lower number of equals first
        chosen.reshape(order.shape)[...] = order
        best = np.take_along_axis(_softmax(logits.astype(np.float64)), order, axis=-1)
        weights.reshape(order.shape)[...] = best / best.sum(-1, keepdims=True) if renormalise else best

    def route_grouped(
        self,
        logits: F32,
        bias: F32,
        k: int,
        groups: int,
        topk_groups: int,
        normalise: bool,
        scale: float,
        chosen: I32,
        weights: F32,
    ) -> None:
        """See Ops; what decides is rounded to float32, as ties are between float32 numbers."""
        if np.isnan(logits).any():
            raise RuntimeError("the router computed a value that is not a number")
        tokens, experts = logits.shape
        score = sigmoid(logits.astype(np.float64))
        ranked = score.astype(np.float32) + bias
        best_two = -np.sort(-ranked.reshape(tokens, groups, -1), axis=-1)[..., :2]
        kept = np.argsort(-best_two.sum(-1), axis=-1, kind="stable")[:, :topk_groups]
        outside = np.ones((tokens, groups), bool)
        np.put_along_axis(outside, kept, False, axis=-1)
        ranked[np.repeat(outside, experts // groups, axis=-1)] = -np.inf
        order = np.argsort(-ranked, axis=-1, kind="stable")[:, :k]
        chosen.reshape(order.shape)[...] = order
        best = np.take_along_axis(score, order, axis=-1)
        if normalise:
            best = best / (best.sum(-1, keepdims=True) + 1e-20)
        weights.reshape(order.shape)[...] = best * scale


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), np.float64)


def _normalised(x: NDArray[Any], eps: float) -> F64:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + eps), np.float64)


def _with_norm(x: NDArray[Any], w: F32 | None, eps: float) -> F64:
    return x.astype(np.float64) if w is None else _normalised(x, eps) * w


def _rotated(x: F64, cos: F64, sin: F64) -> F64:
    """x [T, heads, D] with the pairs (i, i + half) turned by the angles of cos, sin [T, 1, half]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
