"""Eight-bit weights with a grid of scales: FP8 by blocks (DeepSeek, Qwen) and by channels, int8 by channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32, half_to_f32
from flashmoe.checkpoint.float_codes import e4m3, e8m0
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, Matrix, ScaleType
from flashmoe.checkpoint.tensors import FLOAT_TYPES, Run, TensorRef
from flashmoe.errors import CheckpointError

_TYPES = (*FLOAT_TYPES, "F8_E8M0")
_BLOCK = 128  # where config.json states no weight_block_size


@dataclass(frozen=True)
class ScaleGrid:
    """One scale for each block of ``block`` rows and columns of every matrix of ``height`` rows in a stack."""

    scale: TensorRef
    height: int
    block: tuple[int, int]
    shape: tuple[int, int]  # blocks of one matrix

    @classmethod
    def of(cls, weight: TensorRef, scale: TensorRef, stated: tuple[int, int] | None) -> ScaleGrid:
        """Find the blocks from the shapes; raises CheckpointError when none fit."""
        *lead, height, width = (1, 1, *weight.entry.shape)[-max(2, len(weight.entry.shape)) :]
        found = list(scale.entry.shape)
        if math.prod(found) == 1:
            found = [*[1] * len(lead), 1, 1]
        elif found == [*lead, height]:  # one for each row
            found = [*lead, height, 1]
        row, col = stated or (_BLOCK, _BLOCK)
        rows = next((b for b in (row, 1, height) if found[-2:-1] == [-(-height // max(b, 1))]), None)
        cols = next((b for b in (col, width) if found[-1:] == [-(-width // max(b, 1))]), None)
        same = found[:-2] == lead or math.prod(scale.entry.shape) == math.prod(lead) == 1
        if rows is None or cols is None or not same or scale.entry.dtype not in _TYPES:
            raise CheckpointError(
                f"{scale.where} {scale.entry.dtype} {list(scale.entry.shape)} are no scales of"
                f" {list(weight.entry.shape)} in blocks of {row} x {col}: download both again"
            )
        return cls(scale, height, (rows, cols), (found[-2], found[-1]))

    def read(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, blocks of columns]."""
        rows = np.concatenate([np.arange(start, start + count) for start, count in runs])
        lines = rows // self.height * self.shape[0] + rows % self.height // self.block[0]
        first = int(lines.min())
        nbytes = self.scale.entry.nbytes // max(math.prod(self.scale.entry.shape), 1) * self.shape[1]
        raw = self.scale.read_rows([(first, int(lines.max()) + 1 - first)], nbytes)
        dtype = self.scale.entry.dtype
        if dtype == "F8_E8M0":
            values = e8m0(raw)
        elif dtype == "F32":
            values = raw.view("<f4").astype(np.float32, copy=False)
        else:
            values = half_to_f32(raw.view("<u2").astype(np.uint16), "f16" if dtype == "F16" else "bf16")
        picked: F32 = self.scale.finite(values)[lines - first]
        return picked


@dataclass(frozen=True)
class Fp8Matrix(Matrix):
    """E4M3 values times the scale of their block."""

    weight: TensorRef
    grid: ScaleGrid
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """FP8."""
        return "FP8"

    @property
    def fit(self) -> tuple[int, int]:
        """Eight bits: four would throw half of the source away."""
        return 8, 64

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError when a value or a scale is NaN or infinite."""
        values = e4m3(self.weight.read_rows(runs))
        scales = self.grid.read(runs)
        width = self.grid.block[1]
        for i in range(scales.shape[1]):
            values[:, i * width : (i + 1) * width] *= scales[:, i : i + 1]
        return self.weight.finite(values)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.weight, self.grid.scale


@dataclass(frozen=True)
class Int8Matrix(CodedMatrix):
    """Signed bytes times the scale of their row or of a group of columns, less a zero point where there is one."""

    weight: TensorRef
    grid: ScaleGrid
    zeros: TensorRef | None
    rows: int
    cols: int
    group: int
    bits: int = 8

    @property
    def form(self) -> str:
        """Plain int8 of compressed-tensors."""
        return "int8"

    @property
    def scale_type(self) -> ScaleType:
        """The scales' own: -128 of them differ in the exponent only; a product with a zero point may need more."""
        dtype = self.grid.scale.entry.dtype
        return dtype if self.zeros is None and dtype in FLOAT_TYPES else "F32"  # type: ignore[return-value]

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes (value + 128), scales and biases of the rows of ``runs``."""
        codes = self.weight.read_rows(runs) ^ np.uint8(0x80)
        return AffineRows(codes, *self.read_scales(runs))

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        scales = self.grid.read(runs)
        zero = np.float32(-128)
        if self.zeros is None:
            biases = scales * zero
        else:
            raw = self.zeros.read_rows(runs, self.grid.shape[1])
            biases = scales * (zero - raw.view(np.int8).astype(np.float32))
        repeats = self.cols // self.group // scales.shape[1]
        return np.repeat(scales, repeats, axis=1), np.repeat(biases, repeats, axis=1)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (self.weight, self.grid.scale, *([self.zeros] if self.zeros else []))


def fp8_matrix(
    weight: TensorRef, scale: TensorRef, size: tuple[int, int], block: tuple[int, int] | None
) -> Fp8Matrix:
    """The matrix of an E4M3 tensor and its scales; raises CheckpointError when they do not fit each other."""
    return Fp8Matrix(weight, ScaleGrid.of(weight, scale, block), *size)


def int8_matrix(
    weight: TensorRef, scale: TensorRef, zeros: TensorRef | None, size: tuple[int, int]
) -> Int8Matrix:
    """The matrix of an I8 tensor, its scales and zero points; raises CheckpointError when they do not fit."""
    rows, cols = size
    groups = scale.entry.shape[-1] if len(scale.entry.shape) > 1 else 1
    grid = ScaleGrid.of(weight, scale, (1, cols // max(groups, 1) or 1))
    width = grid.block[1]
    if cols % width or width % 32 or grid.block[0] != 1:
        raise CheckpointError(
            f"{scale.where} covers {grid.block[0]} x {width} of {rows} x {cols} values:"
            " flashmoe reads int8 with a scale for each row or for groups of a multiple of 32 columns"
        )
    if zeros is not None and (zeros.entry.dtype != "I8" or zeros.entry.nbytes != rows * grid.shape[1]):
        raise CheckpointError(
            f"{zeros.where} {zeros.entry.dtype} {list(zeros.entry.shape)} does not fit {list(scale.entry.shape)}"
            " scales: download both again"
        )
    return Int8Matrix(weight, grid, zeros, rows, cols, 64 if width % 64 == 0 else 32)
