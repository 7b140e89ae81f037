"""Matrices of a checkpoint, read a few rows at a time: plain floats, or MLX affine codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32, half_to_f32
from flashmoe.checkpoint.header import DTYPE_NBYTES, TensorEntry
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import CheckpointError

U8 = NDArray[np.uint8]
Run = tuple[int, int]  # (first row, number of rows), leading dimensions flattened
FLOAT_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorRef:
    """A tensor of a checkpoint: its place, its shard and the name it has there."""

    entry: TensorEntry
    shard: Path

    @property
    def where(self) -> str:
        """How messages name it: file and tensor."""
        return f"{self.shard}: tensor {self.entry.name!r}"

    def read_rows(self, runs: Sequence[Run]) -> NDArray[Any]:
        """The rows of ``runs``, in their order, raw: u8 [rows, bytes of a row]."""
        row_nbytes = self.entry.shape[-1] * DTYPE_NBYTES[self.entry.dtype]
        parts = [
            read_exact(
                self.shard, self.entry.offset + start * row_nbytes, count * row_nbytes, keep_cached=False
            )
            for start, count in runs
        ]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.reshape(-1, row_nbytes)


class AffineRows(NamedTuple):
    """Rows of an affine matrix: value = scales * codes + biases per group of columns, in float32."""

    codes: U8  # [rows, cols]
    scales: F32  # [rows, cols // group]
    biases: F32  # [rows, cols // group]

    def values(self) -> F32:
        """float32 [rows, cols]: the product is rounded, then the sum."""
        rows, groups = self.scales.shape
        out = self.codes.reshape(rows, groups, -1).astype(np.float32)
        out *= self.scales[:, :, None]
        out += self.biases[:, :, None]
        return out.reshape(rows, -1)


@dataclass(frozen=True)
class FloatMatrix:
    """A matrix of BF16, F16 or F32 values, [rows, cols] with leading dimensions flattened."""

    weight: TensorRef
    rows: int
    cols: int

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError when a value is NaN or infinite."""
        values = raw_to_f32(self.weight.read_rows(runs), self.weight.entry.dtype)
        if not math.isfinite(float(np.min(values))) or not math.isfinite(float(np.max(values))):
            raise CheckpointError(f"{self.weight.where} holds NaN or infinity: download it again")
        return values

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (self.weight,)


@dataclass(frozen=True)
class AffineMatrix:
    """An MLX affine matrix: ``bits``-bit codes, one scale and bias per ``group`` columns."""

    weight: TensorRef
    scales: TensorRef
    biases: TensorRef
    rows: int
    cols: int
    bits: int
    group: int

    @property
    def scale_type(self) -> Literal["BF16", "F16", "F32"]:
        """The wider of the types of scales and biases."""
        types = {self.scales.entry.dtype, self.biases.entry.dtype}
        return types.pop() if len(types) == 1 else "F32"  # type: ignore[return-value]

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or infinity."""
        codes = unpack_codes(self.weight.read_rows(runs), self.bits)
        return AffineRows(codes, *self.read_scales(runs))

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        scales, biases = (raw_to_f32(r.read_rows(runs), r.entry.dtype) for r in (self.scales, self.biases))
        if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
            raise CheckpointError(f"{self.scales.where} holds NaN or infinity: download it again")
        return scales, biases

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols], dequantised."""
        return self.read(runs).values()

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (self.weight, self.scales, self.biases)


Matrix = FloatMatrix | AffineMatrix


def raw_to_f32(raw: U8, dtype: str) -> F32:
    """float32 [rows, n] of little-endian bytes [rows, n * itemsize] of a FLOAT_TYPES type."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    return half_to_f32(raw.view("<u2").astype(np.uint16, copy=False), "f16" if dtype == "F16" else "bf16")


def unpack_codes(raw: U8, bits: int) -> U8:
    """Codes u8 [rows, n] of a dense little-endian bit stream [rows, n * bits / 8]; n is a multiple of 8."""
    rows, nbytes = raw.shape
    if bits == 8:
        return raw
    mask = np.uint8((1 << bits) - 1)
    if bits in (2, 4):
        fields = [(raw >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
        return np.stack(fields, axis=-1).reshape(rows, -1)
    # 3, 5 and 6 bits straddle bytes: eight codes fill exactly ``bits`` bytes, taken as one 64-bit word.
    words = np.zeros((rows, nbytes // bits, 8), np.uint8)
    words[:, :, :bits] = raw.reshape(rows, -1, bits)
    stream = words.view("<u8")[:, :, 0]
    codes = [(stream >> np.uint64(bits * j)).astype(np.uint8) & mask for j in range(8)]
    return np.stack(codes, axis=-1).reshape(rows, -1)
