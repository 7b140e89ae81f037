"""compressed-tensors' packed forms: integers of 2 to 8 bits in 32-bit words, and NVFP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.float_codes import FP4, e4m3, nibbles
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, Matrix, ScaleType, unpack_codes
from flashmoe.checkpoint.tensors import FLOAT_TYPES, U8, Run, TensorRef, raw_to_f32
from flashmoe.errors import CheckpointError


@dataclass(frozen=True)
class _Packed:
    """Codes along the columns, zero points along the rows; both are stored with 2 ** (bits - 1) added."""

    weight: TensorRef
    scales: TensorRef
    zeros: TensorRef | None
    indices: TensorRef | None
    bits: int
    groups: int

    def codes(self, runs: Sequence[Run], cols: int) -> U8:
        return unpack_codes(self.weight.read_rows(runs), self.bits)[:, :cols]

    def scale_values(self, runs: Sequence[Run]) -> F32:
        return self.scales.floats(runs)

    def zero_points(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, groups], of codes as they are stored."""
        if self.zeros is None:
            return np.full((sum(n for _, n in runs), self.groups), 1 << (self.bits - 1), np.float32)
        parts = []
        for start, count in runs:
            first, end = start // 32, -(-(start + count) // 32)  # 32 rows fill ``bits`` words
            last = min(self.bits * end, self.zeros.entry.shape[0])
            raw = self.zeros.read_rows([(self.bits * first, last - self.bits * first)])
            words = np.zeros((self.groups, self.bits * (end - first)), "<u4")
            words[:, : len(raw)] = raw.view("<u4").T
            parts.append(unpack_codes(words.view(np.uint8), self.bits)[:, start - 32 * first :][:, :count].T)
        return np.concatenate(parts).astype(np.float32)

    def refs(self) -> tuple[TensorRef, ...]:
        return self.weight, self.scales, *(ref for ref in (self.zeros, self.indices) if ref)


@dataclass(frozen=True)
class PackedMatrix(CodedMatrix):
    """pack-quantized: scale * (code - zero) by groups of columns."""

    packed: _Packed
    rows: int
    cols: int
    bits: int
    group: int

    @property
    def form(self) -> str:
        """Packed integers."""
        return f"compressed-tensors int{self.bits}"

    @property
    def scale_type(self) -> ScaleType:
        """The scales' own: half the range of codes is a power of two; a zero point is any number."""
        dtype = self.packed.scales.entry.dtype
        return "F32" if self.packed.zeros is not None else dtype  # type: ignore[return-value]

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``."""
        return AffineRows(self.packed.codes(runs, self.cols), *self.read_scales(runs))

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        scales = self.packed.scale_values(runs)
        biases = -scales * self.packed.zero_points(runs)
        repeats = self.cols // self.group // self.packed.groups
        return np.repeat(scales, repeats, axis=1), np.repeat(biases, repeats, axis=1)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.packed.refs()


@dataclass(frozen=True)
class ScatteredPackedMatrix(Matrix):
    """pack-quantized with columns in any order of groups (weight_g_idx)."""

    packed: _Packed
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """Packed integers, reordered."""
        return f"compressed-tensors int{self.packed.bits} with act-order"

    @property
    def fit(self) -> tuple[int, int]:
        """As many bits as it has, in new groups."""
        return (self.packed.bits if self.packed.bits in (2, 3, 4) else 8), 64

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError on NaN or a group that does not exist."""
        scales, zeros = self.packed.scale_values(runs), self.packed.zero_points(runs)
        assert self.packed.indices is not None
        order = self.packed.indices.read_all().view("<i4")
        if order.size and not 0 <= order.min() <= order.max() < scales.shape[1]:
            raise CheckpointError(
                f"{self.packed.indices.where} names a group that is not there: download it again"
            )
        return (self.packed.codes(runs, self.cols) - zeros[:, order]) * scales[:, order]

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.packed.refs()


@dataclass(frozen=True)
class Nvfp4Matrix(Matrix):
    """E2M1 values, an E4M3 scale for 16 of them, one float32 divisor for all."""

    weight: TensorRef
    scales: TensorRef
    divisor: TensorRef
    rows: int
    cols: int

    @property
    def form(self) -> str:
        """NVFP4."""
        return "NVFP4"

    @property
    def fit(self) -> tuple[int, int]:
        """Two scales meet in a group of 32: eight bits hold both grids well, four would not."""
        return 8, 32

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]: value * (scale / divisor); raises CheckpointError on NaN or infinity."""
        divisor = raw_to_f32(self.divisor.read_all()[None], "F32")[0, 0]
        if not np.isfinite(divisor) or divisor == 0:
            raise CheckpointError(f"{self.divisor.where} is {divisor}: download it again")
        scales = e4m3(self.scales.read_rows(runs)) / divisor
        values = FP4[nibbles(self.weight.read_rows(runs))].reshape(*scales.shape, 16)
        values *= scales[:, :, None]
        return self.scales.finite(values.reshape(-1, self.cols))

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.weight, self.scales, self.divisor


def packed_matrix(
    tensors: Sequence[TensorRef],
    zeros: TensorRef | None,
    indices: TensorRef | None,
    size: tuple[int, int],
    stated: frozenset[int],
) -> Matrix:
    """The matrix of weight_packed and weight_scale; raises CheckpointError when they do not fit each other.

    ``stated``: the numbers of bits that config.json knows, any when it names none.
    """
    weight, scales = tensors
    rows, cols = size
    words = weight.entry.shape[-1] if len(weight.entry.shape) == 2 else 0
    bits = 32 * words // max(cols, 1)
    groups = scales.entry.shape[-1] if len(scales.entry.shape) == 2 else 0
    fits = (
        bits in (2, 3, 4, 5, 6, 8)
        and (not stated or bits in stated)
        and groups > 0
        and cols % 32 == 0
        and cols % groups == 0
        and weight.entry.shape == (rows, cols * bits // 32)
        and weight.entry.dtype in ("I32", "U32")
        and scales.entry.shape == (rows, groups)
        and scales.entry.dtype in FLOAT_TYPES
        and (zeros is None or zeros.entry.shape == (-(-rows * bits // 32), groups))
        and (zeros is None or zeros.entry.dtype in ("I32", "U32"))
        and (indices is None or (indices.entry.dtype, indices.entry.shape) == ("I32", (cols,)))
    )
    group = cols // max(groups, 1)
    if not fits or (group % 32 and indices is None):
        raise CheckpointError(
            f"{weight.where} {weight.entry.dtype} {list(weight.entry.shape)} with scales"
            f" {list(scales.entry.shape)} is no packed form of [{rows}, {cols}] in groups of a multiple of 32:"
            " check config.json, or use a bf16 variant"
        )
    packed = _Packed(weight, scales, zeros, indices, bits, groups)
    if indices is not None and groups > 1:
        return ScatteredPackedMatrix(packed, rows, cols)
    return PackedMatrix(packed, rows, cols, bits, 64 if group % 64 == 0 else 32)


def nvfp4_matrix(tensors: Sequence[TensorRef], size: tuple[int, int]) -> Nvfp4Matrix:
    """The matrix of weight_packed, weight_scale and weight_global_scale; raises CheckpointError on a misfit."""
    weight, scales, divisor = tensors
    rows, cols = size
    fits = (
        cols % 32 == 0
        and weight.entry.shape == (rows, cols // 2)
        and (scales.entry.dtype, scales.entry.shape) == ("F8_E4M3", (rows, cols // 16))
        and (divisor.entry.dtype, divisor.entry.nbytes) == ("F32", 4)
    )
    if not fits:
        raise CheckpointError(
            f"{weight.where} {weight.entry.dtype} {list(weight.entry.shape)} is no NVFP4 form of [{rows}, {cols}]:"
            " check config.json, or use a bf16 variant"
        )
    return Nvfp4Matrix(weight, scales, divisor, rows, cols)
