"""Matrices of a GGUF file: blocks whose codes can be kept, and blocks that the gguf package dequantises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.float_codes import FP4_CODES
from flashmoe.checkpoint.gguf.blocks import AFFINE, GROUP, REFITTED, mxfp4_entries
from flashmoe.checkpoint.gguf.types import BLOCKS
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, Matrix, ScaleType
from flashmoe.checkpoint.tensors import U8, Run, TensorRef
from flashmoe.errors import CheckpointError

_SLICE_BLOCKS = 4096  # the package's lookups make copies of 32 times a block


@dataclass(frozen=True)
class BlockMatrix(CodedMatrix):
    """Blocks that are affine by groups of 32."""

    weight: TensorRef
    rows: int
    cols: int
    group: int = GROUP

    @property
    def form(self) -> str:
        """GGML's name of the type."""
        return self.weight.entry.dtype

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Bits of a code."""
        return AFFINE[self.weight.entry.dtype].bits

    @property
    def scale_type(self) -> ScaleType:
        """A 16-bit type, that of the block or the closest."""
        return AFFINE[self.weight.entry.dtype].scale_type

    @property
    def rounded(self) -> bool:
        """True for K-quants, whose scales are products."""
        return AFFINE[self.weight.entry.dtype].rounded

    @property
    def table(self) -> tuple[int, ...] | None:
        """FP4's values for MXFP4."""
        return tuple(FP4_CODES.tolist()) if self.weight.entry.dtype == "MXFP4" else None

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        """As read, with FP4 codes."""
        return self._read(runs, mxfp4_entries)

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or infinity."""
        return self._read(runs, AFFINE[self.weight.entry.dtype].codes)

    def _read(self, runs: Sequence[Run], decode: Callable[[U8], AffineRows]) -> AffineRows:
        nbytes = BLOCKS[self.weight.entry.dtype][1]
        raw = self.weight.read_rows(runs)
        with np.errstate(invalid="ignore", over="ignore"):
            codes, scales, biases = decode(raw.reshape(-1, nbytes))
        self.weight.finite(scales)
        self.weight.finite(biases)
        return AffineRows(
            codes.reshape(len(raw), -1), scales.reshape(len(raw), -1), biases.reshape(len(raw), -1)
        )

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensor it is read from."""
        return (self.weight,)


@dataclass(frozen=True)
class PackageMatrix(Matrix):
    """Blocks that the gguf package turns into values."""

    weight: TensorRef
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """GGML's name of the type."""
        return self.weight.entry.dtype

    @property
    def fit(self) -> tuple[int, int]:
        """Bits by type, in groups of 32."""
        return REFITTED[self.weight.entry.dtype], GROUP

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError on NaN, infinity, or without the package."""
        quants = _package(self.weight)
        per_block, nbytes = BLOCKS[self.weight.entry.dtype]
        blocks = self.weight.read_rows(runs).reshape(-1, nbytes)
        values = np.empty((len(blocks), per_block), np.float32)
        kind = quants.GGMLQuantizationType[self.weight.entry.dtype]
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), _SLICE_BLOCKS):
                part = slice(start, start + _SLICE_BLOCKS)
                values[part] = quants.dequantize(blocks[part], kind)
        return self.weight.finite(values.reshape(-1, self.cols))

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensor it is read from."""
        return (self.weight,)


def block_matrix(weight: TensorRef, rows: int, cols: int) -> Matrix:
    """The matrix of a quantised tensor; raises CheckpointError for a type that nobody dequantises."""
    dtype = weight.entry.dtype
    if dtype in AFFINE:
        return BlockMatrix(weight, rows, cols)
    if dtype not in REFITTED:
        raise CheckpointError(f"{weight.where} has the type {dtype}: use a Q4_K_M, Q8_0 or bf16 variant")
    _package(weight)
    return PackageMatrix(weight, rows, cols)


def _package(weight: TensorRef):  # type: ignore[no-untyped-def]  # an optional module
    try:
        from gguf import quants
    except ImportError as error:
        raise CheckpointError(
            f"{weight.where} has the type {weight.entry.dtype}: pip install 'flashmoe[gguf]' to read it"
        ) from error
    return quants
