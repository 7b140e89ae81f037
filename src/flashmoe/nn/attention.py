"""Grouped-query attention with normalised queries and keys, partial rotary positions and an output gate (Qwen3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashmoe.kernels.kv_cache import POSITIONS, cache_shape
from flashmoe.nn.weights import F32, Weights
from flashmoe.nn.workspace import Workspace


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one layer.  Query head h reads key/value head h // (heads // kv_heads)."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class RotaryTable:
    """cos and sin of every position and frequency, float32 [context, rotated // 2] (Su et al., arXiv 2104.09864).

    Angles are rounded to float32 before the cosine, as the reference implementation does: at position 1,500 the
    difference to exact angles is already 1e-4.
    """

    def __init__(self, context: int, rotated: int, theta: float) -> None:
        exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
        inverse = (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)
        angles = np.arange(context, dtype=np.float32)[:, None] * inverse[None, :]
        self.cos: F32 = np.cos(angles)
        self.sin: F32 = np.sin(angles)

    @staticmethod
    def nbytes_of(context: int, rotated: int) -> int:
        """Bytes of both tables."""
        return 4 * context * rotated


class KeyValueCache:
    """Keys (after norm and rotation) and values of one layer, as kernels/kv_cache.py lays them out."""

    def __init__(self, shape: AttentionShape, context: int, dtype: DTypeLike) -> None:
        size = cache_shape(shape.kv_heads, context, shape.head_dim, dtype)
        # Zero pages cost nothing until they are written: memory grows with the conversation.
        self.keys: NDArray[Any] = np.zeros(size, dtype)
        self.values: NDArray[Any] = np.zeros(size, dtype)

    @property
    def position_nbytes(self) -> int:
        """Bytes of one position's keys and values."""
        return int((self.keys.nbytes + self.values.nbytes) // (POSITIONS * self.keys.shape[1]))

    @staticmethod
    def nbytes_of(shape: AttentionShape, context: int, dtype: DTypeLike) -> int:
        """Bytes of one layer's cache when the context is full."""
        size = prod(cache_shape(shape.kv_heads, context, shape.head_dim, dtype))
        return 2 * size * np.dtype(dtype).itemsize

    @staticmethod
    def parts_nbytes(shape: AttentionShape, context: int) -> int:
        """Bytes in which the kernels keep a token's results for each 256 keys, once for all layers."""
        tasks = shape.kv_heads * -(-shape.heads // (8 * shape.kv_heads))
        return tasks * -(-context // 256) * 8 * 4 * (-(-shape.head_dim // 16) * 16 + 2)

    def arrays(self, position: int) -> list[NDArray[Any]]:
        """Views of the blocks that hold the first `position` positions."""
        blocks = -(-position // POSITIONS)
        return [self.keys[:, :blocks], self.values[:, :blocks]]

    def clear(self) -> None:
        """Nothing to do: positions beyond the sequence are never read."""


# A sequence's share of a call: its cache, its tokens before the call, and its rows.
CachePart = tuple[KeyValueCache, int, slice]


class GatedAttention:
    """One layer's mixer; a call appends its tokens to the cache."""

    def __init__(
        self, weights: Weights, prefix: str, shape: AttentionShape, rotary: RotaryTable, ops: Any
    ) -> None:
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._shape, self._rotary, self._ops = shape, rotary, ops
        self._projections = [
            weights.matrix(prefix + "q_proj", 2 * width, shape.hidden),  # per head: query, then gate
            weights.matrix(prefix + "k_proj", kv_width, shape.hidden),
            weights.matrix(prefix + "v_proj", kv_width, shape.hidden),
        ]
        self._out_proj = [weights.matrix(prefix + "o_proj", shape.hidden, width)]
        self._q_norm = weights.vector(prefix + "q_norm", shape.head_dim)
        self._k_norm = weights.vector(prefix + "k_norm", shape.head_dim)

    def __call__(self, x: F32, parts: Sequence[CachePart], work: Workspace, out: F32) -> None:
        """x, out: [tokens, hidden], of one sequence after the other."""
        shape, ops, tokens = self._shape, self._ops, x.shape[0]
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        q_gate = work.get("q_gate", (tokens, 2 * width))
        k = work.get("k", (tokens, kv_width))
        v = work.get("v", (tokens, kv_width))
        ops.linear(x, self._projections, [q_gate, k, v])
        q = work.get("q", (tokens, shape.heads, shape.head_dim))
        mixed = work.get("mixed", (tokens, width))
        for cache, position, rows in parts:
            ops.attention_prepare(
                q_gate[rows],
                k[rows],
                v[rows],
                self._q_norm,
                self._k_norm,
                shape.eps,
                self._rotary.cos,
                self._rotary.sin,
                position,
                q[rows],
                cache.keys,
                cache.values,
            )
            ops.attention(q[rows], cache.keys, cache.values, position, q_gate[rows], mixed[rows])
        ops.linear(mixed, self._out_proj, [out])
