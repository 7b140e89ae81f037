"""Matrices of a checkpoint, read a few rows at a time: values, or codes with a scale and bias per group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.tensors import FLOAT_TYPES, U8, Run, TensorRef, raw_to_f32

ScaleType = Literal["BF16", "F16", "F32"]


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


class Matrix(ABC):
    """A matrix [rows, cols] of a checkpoint, leading dimensions flattened.  Immutable."""

    rows: int
    cols: int

    @property
    @abstractmethod
    def form(self) -> str:
        """How the source stores it, as people call it."""

    @property
    def fit(self) -> tuple[int, int] | None:
        """(bits, largest group) of a tile for its values where nobody asks for another; None: as for floats."""
        return None

    @property
    def where(self) -> str:
        """How messages name it: file and tensor."""
        return self.refs()[0].where

    @abstractmethod
    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols], dequantised; raises CheckpointError when a value is NaN or infinite."""

    @abstractmethod
    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from, that of the weights first."""


class CodedMatrix(Matrix):
    """A matrix whose values are scale * code + bias: its codes can be kept.

    ``group``, a multiple of 32 that divides ``cols``: columns that share scale and bias.
    """

    bits: int
    group: int

    @property
    @abstractmethod
    def scale_type(self) -> ScaleType:
        """A type that holds every scale and bias; F32 says that only a look at them can tell of a narrower one."""

    @property
    def rounded(self) -> bool:
        """True when ``scale_type`` does not hold them all exactly, by the nature of the form."""
        return False

    @abstractmethod
    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or infinity."""

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        _, scales, biases = self.read(runs)
        return scales, biases

    @property
    def table(self) -> tuple[int, ...] | None:
        """The sixteen values that codes may have, if there are no more: read_entries then tells which."""
        return None

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        """As read, with places in the table instead of codes."""
        raise NotImplementedError

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols], dequantised."""
        return self.read(runs).values()


@dataclass(frozen=True)
class FloatMatrix(Matrix):
    """A matrix of BF16, F16 or F32 values."""

    weight: TensorRef
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """Floats."""
        return "floats"

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError when a value is NaN or infinite."""
        return self.weight.floats(runs)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensor it is read from."""
        return (self.weight,)


@dataclass(frozen=True)
class AffineMatrix(CodedMatrix):
    """An MLX affine matrix: ``bits``-bit codes, one scale and bias per ``group`` columns."""

    weight: TensorRef
    scales: TensorRef
    biases: TensorRef
    rows: int
    cols: int
    bits: int
    group: int

    @property
    def form(self) -> str:
        """MLX affine."""
        return "MLX affine"

    @property
    def scale_type(self) -> ScaleType:
        """The wider of the types of scales and biases."""
        return widest_type(self.scales, self.biases)

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or infinity."""
        codes = unpack_codes(self.weight.read_rows(runs), self.bits)
        return AffineRows(codes, *self.read_scales(runs))

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        return self.scales.floats(runs), self.biases.floats(runs)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (self.weight, self.scales, self.biases)


def widest_type(*refs: TensorRef) -> ScaleType:
    """The type of float tensors that all share, else F32."""
    types = {ref.entry.dtype for ref in refs}
    return types.pop() if len(types) == 1 else "F32"  # type: ignore[return-value]


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


__all__ = [
    "FLOAT_TYPES",
    "AffineMatrix",
    "AffineRows",
    "CodedMatrix",
    "FloatMatrix",
    "Matrix",
    "Run",
    "ScaleType",
    "TensorRef",
    "raw_to_f32",
    "unpack_codes",
    "widest_type",
]
