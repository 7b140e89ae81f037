"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed: the cache holds latents alone.

Keys and values of all heads are products of one latent c of each position: k = W_k c, v = W_v c, beside a rotated key
that the heads share.  q . k = (W_k^T q) . c, so queries are brought to the latent's space and results back from it, and
a position costs rank + rotated numbers (576 in DeepSeek-V3) instead of 40,960.  Prompts take the same way: their bits
must be those of single tokens.
"""

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

# Rows whose absorbed queries exist at a time: 0.53 MB each in DeepSeek-V3, where a prompt's chunk would take 1.1 GB.
_ROWS = 64
_LANES, _SPAN = (
    32,
    2048,
)  # heads and keys whose sums the kernel keeps together (native: kLatentHeads, kLatentSpan)


@dataclass(frozen=True)
class LatentAttentionShape(MixerShape):
    """Sizes of one layer.  query_rank 0: queries have no latent of their own.  scale: of the scores."""

    hidden: int
    heads: int
    query_rank: int
    rank: int
    nope: int  # of a head's query and key without position
    value_dim: int
    eps: float
    scale: float
    rope: Rope
    interleaved: bool

    prefix: ClassVar[str] = "self_attn."

    @property
    def width(self) -> int:
        """Numbers of a cached position, and of an absorbed query."""
        return self.rank + self.rope.rotated

    @property
    def query_dim(self) -> int:
        """Of one head."""
        return self.nope + self.rope.rotated

    def build(self, weights: Weights, prefix: str, rotary: RotaryTables, ops: Any) -> LatentAttention:
        """The block."""
        return LatentAttention(weights, prefix, self, rotary.of(self.rope), ops)

    def new_state(self, context: int, kv_dtype: DTypeLike) -> LatentCache:
        """An empty cache."""
        return LatentCache(self, context, kv_dtype)

    def state_nbytes(self, context: int, kv_dtype: DTypeLike) -> int:
        """Bytes of one layer's."""
        return prod(cache_shape(1, context, self.width, kv_dtype)) * np.dtype(kv_dtype).itemsize

    def position_nbytes(self, kv_dtype: DTypeLike) -> int:
        """A latent and its rotated key."""
        return self.width * np.dtype(kv_dtype).itemsize

    def ropes(self) -> tuple[Rope, ...]:
        """One for queries and keys."""
        return (self.rope,)

    def kernel_nbytes(self, context: int) -> int:
        """A token's sums for each span of keys are kept apart."""
        return 4 * -(-self.heads // _LANES) * -(-context // _SPAN) * (self.rank + 2) * _LANES

    def float_work(self) -> tuple[int, int]:
        """See MixerShape; the absorbed products are matrices of their own."""
        return 0, self.heads * (self.width + self.rank)

    def widest(self) -> int:
        """The output projection's input, or the queries' latent."""
        return max(self.heads * self.value_dim, self.query_rank)

    def buffers(self) -> Mapping[str, int]:
        """See MixerShape."""
        return {
            "q_latent": self.query_rank,
            "q": self.heads * self.query_dim,
            "latents": self.width,
            "mixed": self.heads * self.value_dim,
        }

    def scratch(self, tokens: int) -> int:
        """Absorbed queries and their results of a few rows; inputs of the products by heads, as planes or floats."""
        rows, widest = min(tokens, _ROWS), max(self.nope, self.rank)
        return rows * self.heads * (self.width + self.rank + 2 * widest) + 128 * self.heads


class LatentCache:
    """Latents and rotated keys of one layer, as kernels/kv_cache.py lays them out."""

    grows: ClassVar[bool] = True

    def __init__(self, shape: LatentAttentionShape, context: int, dtype: DTypeLike) -> None:
        # Zero pages cost nothing until they are written: memory grows with the conversation.
        self.latents: NDArray[Any] = np.zeros(cache_shape(1, context, shape.width, dtype), dtype)

    @property
    def caches(self) -> list[NDArray[Any]]:
        """The whole arrays, [heads, blocks of positions, block] each."""
        return [self.latents]

    @property
    def position_nbytes(self) -> int:
        """Bytes of one position."""
        return int(self.latents.nbytes // (POSITIONS * self.latents.shape[1]))

    def arrays(self, position: int) -> list[NDArray[Any]]:
        """Views of the blocks that hold the first `position` positions."""
        return [self.latents[:, : -(-position // POSITIONS)]]

    def clear(self) -> None:
        """Nothing to do: positions beyond the sequence are never read."""


class LatentAttention:
    """One layer's mixer; a call appends its tokens to the cache."""

    def __init__(
        self, weights: Weights, prefix: str, shape: LatentAttentionShape, rotary: RotaryTable, ops: Any
    ) -> None:
        self._shape, self._rotary, self._ops = shape, rotary, ops
        queries, heads = shape.heads * shape.query_dim, shape.heads
        kv_a = weights.matrix(prefix + "kv_a_proj_with_mqa", shape.width, shape.hidden)
        if shape.query_rank:
            self._inputs = [weights.matrix(prefix + "q_a_proj", shape.query_rank, shape.hidden), kv_a]
            self._q_norm: F32 | None = weights.vector(prefix + "q_a_layernorm", shape.query_rank)
            self._q_proj = [weights.matrix(prefix + "q_b_proj", queries, shape.query_rank)]
        else:
            self._inputs = [weights.matrix(prefix + "q_proj", queries, shape.hidden), kv_a]
            self._q_norm = None
        self._norm = weights.vector(prefix + "kv_a_layernorm", shape.rank)
        self._absorb = weights.matrix(prefix + "k_b_proj", heads * shape.rank, shape.nope)
        self._release = weights.matrix(prefix + "v_b_proj", heads * shape.value_dim, shape.rank)
        self._out_proj = [weights.matrix(prefix + "o_proj", shape.hidden, heads * shape.value_dim)]

    def __call__(
        self, x: F32, parts: Sequence[tuple[LatentCache, int, slice]], work: Workspace, out: F32
    ) -> None:
        """x, out: [tokens, hidden], of one sequence after the other."""
        shape, tokens = self._shape, x.shape[0]
        q = work.get("q", (tokens, shape.heads, shape.query_dim))
        latents = work.get("latents", (tokens, shape.width))
        mixed = work.get("mixed", (tokens, shape.heads, shape.value_dim))
        self._project(x, q, latents, work)
        for first in range(0, tokens, _ROWS):
            self._attend(q, latents, parts, first, min(first + _ROWS, tokens), work, mixed)
        self._ops.linear(mixed.reshape(tokens, -1), self._out_proj, [out])

    def _project(self, x: F32, q: F32, latents: F32, work: Workspace) -> None:
        ops = self._ops
        if self._q_norm is None:
            ops.linear(x, self._inputs, [q, latents])
            return
        q_latent = work.get("q_latent", (len(x), self._shape.query_rank))
        ops.linear(x, self._inputs, [q_latent, latents])
        ops.rms_norm(q_latent, self._q_norm, self._shape.eps, q_latent)
        ops.linear(q_latent, self._q_proj, [q])

    def _attend(
        self,
        q: F32,
        latents: F32,
        parts: Sequence[tuple[LatentCache, int, slice]],
        first: int,
        end: int,
        work: Workspace,
        mixed: F32,
    ) -> None:
        """Rows first to end - 1: queries into the latents' space, attention there, and back."""
        shape, ops = self._shape, self._ops
        absorbed = work.get("absorbed", (end - first, shape.heads, shape.width))
        attended = work.get("attended", (end - first, shape.heads, shape.rank))
        ops.head_linear(q[first:end], self._absorb, absorbed)
        for cache, position, rows in parts:
            begin, stop = max(rows.start, first), min(rows.stop, end)
            if begin >= stop:
                continue
            at, here = position + begin - rows.start, slice(begin - first, stop - first)
            ops.mla_prepare(
                q[begin:stop],
                latents[begin:stop],
                self._norm,
                shape.eps,
                self._rotary.cos,
                self._rotary.sin,
                shape.interleaved,
                at,
                absorbed[here],
                cache.latents,
            )
            ops.mla_attention(absorbed[here], cache.latents, at, shape.scale, attended[here])
        ops.head_linear(attended, self._release, mixed[first:end])
