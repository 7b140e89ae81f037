"""Gated DeltaNet token mixer (Yang et al., arXiv 2412.06464) as Qwen3-Next and Qwen3.5 use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from flashmoe.kernels.arrays import zeros_f32
from flashmoe.nn.blocks import MixerShape
from flashmoe.nn.rotary import RotaryTables
from flashmoe.nn.weights import F32, Weights
from flashmoe.nn.workspace import Workspace


@dataclass(frozen=True)
class DeltaNetShape(MixerShape):
    """Sizes of one layer.  Value head h uses key head h // (value_heads // key_heads)."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    eps: float

    prefix: ClassVar[str] = "linear_attn."

    @property
    def channels(self) -> int:
        """Convolved channels: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def values(self) -> int:
        """Width of all value heads together."""
        return self.value_heads * self.value_dim

    def widest(self) -> int:
        """The output projection's input."""
        return self.values

    def build(self, weights: Weights, prefix: str, rotary: RotaryTables, ops: Any) -> GatedDeltaNet:
        """The block."""
        return GatedDeltaNet(weights, prefix, self, ops)

    def new_state(self, context: int, kv_dtype: DTypeLike) -> DeltaNetState:
        """An empty cache or state."""
        return DeltaNetState.zeros(self)

    def state_nbytes(self, context: int, kv_dtype: DTypeLike) -> int:
        """Bytes of one layer's."""
        memory = self.value_heads * self.key_dim * self.value_dim
        return 4 * ((self.conv_kernel - 1) * self.channels + memory)

    def state_traffic(self) -> int:
        """Read and written once."""
        return 2 * self.state_nbytes(0, np.float32)

    def float_work(self) -> tuple[int, int]:
        """See MixerShape."""
        return 4 * self.value_heads * self.key_dim * self.value_dim, 0

    def buffers(self) -> Mapping[str, int]:
        """See MixerShape."""
        return {
            "qkv": self.channels,
            "z": self.values,
            "b": self.value_heads,
            "a": self.value_heads,
            "mixed": self.channels,
        }

    def scratch(self, tokens: int) -> int:
        """Of 256 tokens: keys and queries, one pair a value head, and gates, in whole cache lines."""
        return self.value_heads * (2 * self.key_dim + 18) * min(tokens, 256)


@dataclass
class DeltaNetState:
    """What a sequence carries from token to token in one layer."""

    grows: ClassVar[bool] = False

    conv: F32  # [kernel - 1, channels]: the last inputs of the convolution
    memory: F32  # [value_heads, key_dim, value_dim]

    @staticmethod
    def zeros(shape: DeltaNetShape) -> DeltaNetState:
        """State before the first token."""
        return DeltaNetState(
            np.zeros((shape.conv_kernel - 1, shape.channels), np.float32),
            zeros_f32((shape.value_heads, shape.key_dim, shape.value_dim)),
        )

    def arrays(self, position: int) -> list[F32]:
        """All of it, whatever the position."""
        return [self.conv, self.memory]

    def clear(self) -> None:
        """Back to the state before the first token."""
        self.conv.fill(0)
        self.memory.fill(0)


class GatedDeltaNet:
    """One layer's mixer; a call advances the state by the tokens it is given."""

    def __init__(self, weights: Weights, prefix: str, shape: DeltaNetShape, ops: Any) -> None:
        heads, hidden = shape.value_heads, shape.hidden
        self._shape, self._ops = shape, ops
        self._projections = [
            weights.matrix(prefix + "in_proj_qkv", shape.channels, hidden),
            weights.matrix(prefix + "in_proj_z", shape.values, hidden),
            weights.matrix(prefix + "in_proj_b", heads, hidden),
            weights.matrix(prefix + "in_proj_a", heads, hidden),
        ]
        self._out_proj = [weights.matrix(prefix + "out_proj", hidden, shape.values)]
        conv = weights.vector(prefix + "conv1d", shape.channels, shape.conv_kernel)
        self._conv = np.ascontiguousarray(conv.T)  # taps outermost: the kernel runs along the channels
        self._a_log = weights.vector(prefix + "A_log", heads)
        self._dt_bias = weights.vector(prefix + "dt_bias", heads)
        self._norm = weights.vector(prefix + "norm", shape.value_dim)

    def __call__(
        self, x: F32, parts: Sequence[tuple[DeltaNetState, int, slice]], work: Workspace, out: F32
    ) -> None:
        """x, out: [tokens, hidden], of one sequence after the other; parts: each one's state, position and rows."""
        shape, ops, tokens = self._shape, self._ops, x.shape[0]
        qkv = work.get("qkv", (tokens, shape.channels))
        z = work.get("z", (tokens, shape.value_heads, shape.value_dim))
        b = work.get("b", (tokens, shape.value_heads))
        a = work.get("a", (tokens, shape.value_heads))
        ops.linear(x, self._projections, [qkv, z, b, a])
        mixed = work.get("mixed", (tokens, shape.channels))
        ends = [rows.stop for _, _, rows in parts]
        ops.causal_conv1d(qkv, self._conv, [state.conv for state, _, _ in parts], ends, mixed)
        # The projections have been consumed: the recurrence may write over them.
        read = work.get("qkv", (tokens, shape.value_heads, shape.value_dim))
        memories = [state.memory for state, _, _ in parts]
        ops.gated_delta_rule(mixed, a, b, self._a_log, self._dt_bias, memories, ends, read, shape.key_heads)
        gated = work.get("mixed", (tokens, shape.values))
        ops.gated_rms_norm(read, z, self._norm, shape.eps, gated)
        ops.linear(gated, self._out_proj, [out], gated=True)
