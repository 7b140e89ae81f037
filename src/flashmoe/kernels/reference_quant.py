"""The quantised operations of kernels/ops.py in float64: what planes hold, matrices and feed-forward records."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bundle.codecs import (
    U8,
    DenseCodec,
    FfnBiases,
    FfnLayout,
    TileCodec,
    unpack_biases,
    unpack_ffn,
)
from flashmoe.checkpoint.dtypes import half_to_f32
from flashmoe.kernels.ops import F32

F64 = NDArray[np.float64]

# In units of a row's root mean square: groups with a larger value get a low plane.  Measured on the demo model's
# activations (docs/experiments.md); products of values and gates have longer tails.
COARSE_LIMIT, COARSE_LIMIT_GATED = 3.25, 4.5
PRECISE = 0.0  # every group gets one
SURE_TILES = 64  # of a token's logits, see MatrixOps.logits


def coarse_limit(precise: bool, gated: bool = False) -> float:
    """Of a product: see MatrixOps."""
    if precise:
        return PRECISE
    return COARSE_LIMIT_GATED if gated else COARSE_LIMIT


def sigmoid(x: F64) -> F64:
    """1 / (1 + exp(-x)), to full relative precision on both sides."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), np.float64)


def quantized(x: F32, group: int, coarse_limit: float) -> F64:
    """What a product sees of x [T, K] on the int8 path, [T, K]: scale * (high + low / 128) per group.

    The integers come from float32 arithmetic, because that decides how a half is rounded.
    """
    parts = x.reshape(len(x), x.shape[1] // group, group)
    largest = np.abs(parts).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        # Below 1e-34 the reciprocal overflows; such a group counts as zero.
        inverse = np.where(largest > 1e-34, np.float32(127) / largest, np.float32(0))
    scaled = parts * inverse
    high = np.rint(scaled)
    low = np.rint((scaled - high) * np.float32(128))
    mean_square = np.square(x, dtype=np.float64).mean(-1)[:, None, None]
    fine = np.square(largest, dtype=np.float64) > coarse_limit**2 * mean_square
    scale = (largest / np.float32(127)).astype(np.float64)
    return np.asarray(scale * (high + np.where(fine, low / 128.0, 0.0)), np.float64).reshape(x.shape)


def seen(x: F32, group: int, coarse_limit: float, int8: bool) -> F64:
    """The input of a product with tiles, on either activation path."""
    return quantized(x, group, coarse_limit) if int8 else x.astype(np.float64)


@dataclass(frozen=True)
class ReferenceWeight:
    """A matrix [rows, cols] over its bytes."""

    data: U8
    codec: TileCodec | DenseCodec
    rows: int
    cols: int
    bias: F32 | None = None

    @cached_property
    def values(self) -> F32:
        """float32 [rows, cols]."""
        codec = self.codec
        if isinstance(codec, TileCodec):
            return codec.dequantize(self.data, self.rows, self.cols)
        raw = np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)
        if codec.dtype == "f32":
            return raw.view(np.float32).reshape(self.rows, self.cols)
        half = half_to_f32(raw.view(np.uint16), "f16" if codec.dtype == "f16" else "bf16")
        return half.reshape(self.rows, self.cols)

    def product(self, x: F32, limit: float, int8: bool) -> F64:
        """x W^T, [T, rows]."""
        bias = 0.0 if self.bias is None else self.bias.astype(np.float64)
        return self.seen(x, limit, int8) @ self.values.T.astype(np.float64) + bias

    def seen(self, x: F32, limit: float, int8: bool) -> F64:
        """x [T, cols] as the product sees it."""
        return (
            seen(x, self.codec.group, limit, int8)
            if isinstance(self.codec, TileCodec)
            else x.astype(np.float64)
        )


@dataclass(frozen=True)
class ReferenceRecord:
    """A feed-forward record in memory."""

    layout: FfnLayout
    address: int
    owner: U8

    @property
    def group(self) -> int:
        """Columns of a gate or up tile."""
        return self.layout.gate_up.group


@dataclass
class ReferenceInput:
    """Activations [T, K] and the group size that prepare() was given."""

    x: F32 | None = None
    group: int = 0


def feed_forward(x: F32, layout: FfnLayout, address: int, precise: bool, int8: bool) -> F64:
    """W_down glu(W_gate x, W_up x) of the record at `address` with its biases, [T, hidden]."""
    (gate, up, down), biases = _record_values(layout, address)
    source = seen(x, layout.gate_up.group, coarse_limit(precise), int8)
    hidden = _joined(source @ gate.T + biases.gate, source @ up.T + biases.up, layout)
    padded = np.zeros((len(x), layout.intermediate_padded), np.float32)
    padded[:, : layout.intermediate] = hidden
    return seen(padded, layout.down.group, coarse_limit(precise, gated=True), int8) @ down.T + biases.down


def _joined(gate: F64, up: F64, layout: FfnLayout) -> F64:
    if layout.glu is None:
        return gate * sigmoid(gate) * up
    alpha, limit = layout.glu.alpha, layout.glu.limit
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return np.asarray((up + 1) * gate * sigmoid(alpha * gate), np.float64)


def _record_values(layout: FfnLayout, address: int) -> tuple[tuple[F64, F64, F64], FfnBiases]:
    """float64 gate, up [I, H] and down [H, padded I] of the bytes at `address`, and the biases."""
    bytes_there: Any = (ctypes.c_uint8 * layout.nbytes).from_address(address)
    record = np.ctypeslib.as_array(bytes_there)
    gate, up, down = unpack_ffn(layout, record)
    values = (
        layout.gate_up.values(gate).astype(np.float64),
        layout.gate_up.values(up).astype(np.float64),
        layout.down.values(down).astype(np.float64),
    )
    return values, unpack_biases(layout, record)
