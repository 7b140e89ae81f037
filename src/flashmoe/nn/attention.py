"""Grouped-query attention: norms, biases, an output gate, a window and sinks where the model has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashmoe.kernels.kv_cache import POSITIONS, cache_shape
from flashmoe.nn.blocks import MixerShape
from flashmoe.nn.rotary import Rope, RotaryTable, RotaryTables
from flashmoe.nn.weights import F32, Weights
from flashmoe.nn.workspace import Workspace


@dataclass(frozen=True)
class AttentionShape(MixerShape):
    """Sizes of one layer.  Query head h reads key/value head h // (heads // kv_heads).

    gated: a gate for every output (Qwen3.5).  normed: RMS norms of each query and key head; of all heads together if
    flat_norms (OLMoE).  biased: which of the projections q, k, v, o have biases.  window: positions that a token sees,
    itself included, 0 for all.  sinks: every head has one more score, whose value is zero (gpt-oss).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: Rope
    gated: bool = True
    normed: bool = True
    flat_norms: bool = False
    biased: str = ""
    window: int = 0
    sinks: bool = False

    prefix: ClassVar[str] = "self_attn."

    @property
    def width(self) -> int:
        """Of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of all key heads together."""
        return self.kv_heads * self.head_dim

    def widest(self) -> int:
        """The output projection's input."""
        return self.width

    @property
    def query_width(self) -> int:
        """Of all query heads together with their gates."""
        return 2 * self.width if self.gated else self.width

    def build(self, weights: Weights, prefix: str, rotary: RotaryTables, ops: Any) -> Attention:
        """The block."""
        return Attention(weights, prefix, self, rotary.of(self.rope), ops)

    def new_state(self, context: int, kv_dtype: DTypeLike) -> KeyValueCache:
        """An empty cache or state."""
        return KeyValueCache(self, context, kv_dtype)

    def state_nbytes(self, context: int, kv_dtype: DTypeLike) -> int:
        """Bytes of one layer's."""
        size = prod(cache_shape(self.kv_heads, context, self.head_dim, kv_dtype))
        return 2 * size * np.dtype(kv_dtype).itemsize

    def ropes(self) -> tuple[Rope, ...]:
        """One for queries and keys."""
        return (self.rope,)

    def kernel_nbytes(self, context: int) -> int:
        """A token's results for each 256 keys are kept apart."""
        tasks = self.kv_heads * -(-self.heads // (8 * self.kv_heads))
        return tasks * -(-context // 256) * 8 * 4 * (-(-self.head_dim // 16) * 16 + 2)

    def position_nbytes(self, kv_dtype: DTypeLike) -> int:
        """A key and a value."""
        return 2 * self.kv_width * np.dtype(kv_dtype).itemsize

    def float_work(self) -> tuple[int, int]:
        """See MixerShape."""
        return 0, 2 * self.width

    def buffers(self) -> Mapping[str, int]:
        """See MixerShape."""
        return {
            "q_gate": self.query_width,
            "k": self.kv_width,
            "v": self.kv_width,
            "q": self.width,
            "mixed": self.width,
        }


class KeyValueCache:
    """Keys (after norm and rotation) and values of one layer, as kernels/kv_cache.py lays them out."""

    grows: ClassVar[bool] = True

    def __init__(self, shape: AttentionShape, context: int, dtype: DTypeLike) -> None:
        size = cache_shape(shape.kv_heads, context, shape.head_dim, dtype)
        # Zero pages cost nothing until they are written: memory grows with the conversation.
        self.keys: NDArray[Any] = np.zeros(size, dtype)
        self.values: NDArray[Any] = np.zeros(size, dtype)

    @property
    def caches(self) -> list[NDArray[Any]]:
        """The whole arrays, [heads, blocks of positions, block] each."""
        return [self.keys, self.values]

    @property
    def position_nbytes(self) -> int:
        """Bytes of one position's keys and values."""
        return int((self.keys.nbytes + self.values.nbytes) // (POSITIONS * self.keys.shape[1]))

    def arrays(self, position: int) -> list[NDArray[Any]]:
        """Views of the blocks that hold the first `position` positions."""
        blocks = -(-position // POSITIONS)
        return [self.keys[:, :blocks], self.values[:, :blocks]]

    def clear(self) -> None:
        """Nothing to do: positions beyond the sequence are never read."""


# A sequence's share of a call: its cache, its tokens before the call, and its rows.
CachePart = tuple[KeyValueCache, int, slice]


class Attention:
    """One layer's mixer; a call appends its tokens to the cache."""

    def __init__(
        self, weights: Weights, prefix: str, shape: AttentionShape, rotary: RotaryTable, ops: Any
    ) -> None:
        self._shape, self._rotary, self._ops = shape, rotary, ops

        def projection(name: str, rows: int, cols: int) -> Any:
            return weights.matrix(f"{prefix}{name}_proj", rows, cols, bias=name in shape.biased)

        self._projections = [
            projection("q", shape.query_width, shape.hidden),  # per head: query, then gate
            projection("k", shape.kv_width, shape.hidden),
            projection("v", shape.kv_width, shape.hidden),
        ]
        self._out_proj = [projection("o", shape.hidden, shape.width)]
        self._norms: tuple[F32 | None, F32 | None] = None, None
        if shape.normed:
            sizes = (shape.width, shape.kv_width) if shape.flat_norms else (shape.head_dim,) * 2
            q_norm, k_norm = (
                weights.vector(prefix + name, size)
                for name, size in zip(("q_norm", "k_norm"), sizes, strict=True)
            )
            self._norms = q_norm, k_norm
        self._sinks = weights.vector(prefix + "sinks", shape.heads) if shape.sinks else None

    def __call__(self, x: F32, parts: Sequence[CachePart], work: Workspace, out: F32) -> None:
        """x, out: [tokens, hidden], of one sequence after the other."""
        shape, ops, tokens = self._shape, self._ops, x.shape[0]
        q_gate = work.get("q_gate", (tokens, shape.query_width))
        k = work.get("k", (tokens, shape.kv_width))
        v = work.get("v", (tokens, shape.kv_width))
        ops.linear(x, self._projections, [q_gate, k, v])
        q_norm, k_norm = self._norms
        if shape.flat_norms:
            ops.rms_norm(q_gate, q_norm, shape.eps, q_gate)
            ops.rms_norm(k, k_norm, shape.eps, k)
            q_norm = k_norm = None
        q = work.get("q", (tokens, shape.heads, shape.head_dim))
        mixed = work.get("mixed", (tokens, shape.width))
        for cache, position, rows in parts:
            ops.attention_prepare(
                q_gate[rows],
                k[rows],
                v[rows],
                q_norm,
                k_norm,
                shape.eps,
                self._rotary.cos,
                self._rotary.sin,
                position,
                q[rows],
                cache.keys,
                cache.values,
            )
            gate = q_gate[rows] if shape.gated else None
            ops.attention(
                q[rows], cache.keys, cache.values, position, gate, mixed[rows], shape.window, self._sinks
            )
        ops.linear(mixed, self._out_proj, [out], gated=shape.gated)
