"""GPTQ and AWQ: matrices stored [columns, rows], codes packed into 32-bit words, integer zero points.

value = scale * (code - zero), with one scale and zero point for each row and group of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, Matrix, ScaleType, unpack_codes
from flashmoe.checkpoint.tensors import FLOAT_TYPES, U8, Run, TensorRef, raw_to_f32
from flashmoe.errors import CheckpointError

# Where the eight codes of a word of AWQ's GEMM form lie: row 8j + i in nibble _AWQ_NIBBLE[i].
_AWQ_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)


@dataclass(frozen=True)
class _Columns:
    """The three tensors.  Rows of the matrix are columns of each."""

    weight: TensorRef
    zeros: TensorRef
    scales: TensorRef
    rows: int
    cols: int
    bits: int

    def codes(self, runs: Sequence[Run]) -> U8:
        """u8 [rows of runs, cols]."""
        raise NotImplementedError

    def zero_points(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, groups]."""
        raise NotImplementedError

    def scale_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, groups]."""
        size = self.scales.row_nbytes // self.rows
        parts = [
            raw_to_f32(self.scales.read_columns(start * size, count * size), self.scales.entry.dtype).T
            for start, count in runs
        ]
        return self.scales.finite(np.concatenate(parts))

    def refs(self) -> tuple[TensorRef, ...]:
        return self.weight, self.zeros, self.scales


@dataclass(frozen=True)
class GptqColumns(_Columns):
    """GPTQ: codes of a column are a bit stream down the words; zero points one along them.

    ``zero_offset``: what is added to a stored zero point, 1 in the first version of the format.
    """

    zero_offset: int = 0

    def codes(self, runs: Sequence[Run]) -> U8:
        """u8 [rows of runs, cols]."""
        parts = []
        for start, count in runs:
            raw = self.weight.read_columns(4 * start, 4 * count)  # [words, 4 * count]
            words = np.ascontiguousarray(raw.view("<u4").T)
            parts.append(unpack_codes(words.view(np.uint8), self.bits))
        return np.concatenate(parts)

    def zero_points(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, groups]."""
        parts = []
        for start, count in runs:
            first, end = start // 32, -(-(start + count) // 32)  # 32 codes fill ``bits`` words
            nbytes = min(4 * self.bits * end, self.zeros.row_nbytes) - 4 * self.bits * first
            codes = unpack_codes(self.zeros.read_columns(4 * self.bits * first, nbytes), self.bits)
            parts.append(codes[:, start - 32 * first :][:, :count].T)
        return np.concatenate(parts).astype(np.float32) + np.float32(self.zero_offset)


@dataclass(frozen=True)
class AwqColumns(_Columns):
    """AWQ in its GEMM form: a word holds eight rows in an order of its own."""

    def codes(self, runs: Sequence[Run]) -> U8:
        """u8 [rows of runs, cols]."""
        return self._unpack(self.weight, runs)

    def zero_points(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, groups]."""
        return self._unpack(self.zeros, runs).astype(np.float32)

    def _unpack(self, ref: TensorRef, runs: Sequence[Run]) -> U8:
        parts = []
        for start, count in runs:
            first, end = start // 8, -(-(start + count) // 8)
            words = ref.read_columns(4 * first, 4 * (end - first)).view("<u4")
            fields = (words[:, :, None] >> (4 * _AWQ_NIBBLE)) & np.uint32(15)
            codes = fields.reshape(len(words), -1)[:, start - 8 * first :][:, :count]
            parts.append(np.ascontiguousarray(codes.T, dtype=np.uint8))
        return np.concatenate(parts)


@dataclass(frozen=True)
class ColumnMatrix(CodedMatrix):
    """A GPTQ or AWQ matrix whose groups are runs of columns: its codes can be kept."""

    columns: GptqColumns | AwqColumns
    rows: int
    cols: int
    bits: int
    group: int
    indices: TensorRef | None  # g_idx of GPTQ
    checked: bool  # whether it may be in order only

    @property
    def form(self) -> str:
        """GPTQ or AWQ."""
        return "AWQ" if isinstance(self.columns, AwqColumns) else "GPTQ"

    @property
    def scale_type(self) -> ScaleType:
        """Only a look tells: scale * zero point may need more bits than the scale."""
        return "F32"

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or a hidden order."""
        if self.indices is not None and self.checked:
            order = _indices(self.indices)
            if not np.array_equal(order, np.arange(self.cols) // self.group):
                raise CheckpointError(
                    f"{self.indices.where} reorders columns, config.json says desc_act false: correct it"
                )
        return AffineRows(self.columns.codes(runs), *self.read_scales(runs))

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // group] each."""
        scales = self.columns.scale_values(runs)
        return scales, -scales * self.columns.zero_points(runs)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (*self.columns.refs(), *([self.indices] if self.indices else []))


@dataclass(frozen=True)
class ScatteredMatrix(Matrix):
    """A GPTQ matrix whose columns belong to groups in any order (act-order), or whose groups no tile can have."""

    columns: GptqColumns | AwqColumns
    rows: int
    cols: int
    group: int
    indices: TensorRef | None
    reordered: bool

    @property
    def form(self) -> str:
        """With act-order, or of which group size."""
        name = "AWQ" if isinstance(self.columns, AwqColumns) else "GPTQ"
        return f"{name} with act-order" if self.reordered else f"{name} in groups of {self.group}"

    @property
    def fit(self) -> tuple[int, int]:
        """As many bits as it has, in new groups."""
        bits = self.columns.bits
        return (bits if bits in (2, 3, 4) else 8), 64

    def read_values(self, runs: Sequence[Run]) -> F32:
        """float32 [rows of runs, cols]; raises CheckpointError on NaN or a group that does not exist."""
        scales, zeros = self.columns.scale_values(runs), self.columns.zero_points(runs)
        order: NDArray[np.int64] = np.arange(self.cols) // self.group
        if self.reordered and self.indices is not None:
            order = _indices(self.indices)
            if not 0 <= order.min() <= order.max() < scales.shape[1]:
                raise CheckpointError(
                    f"{self.indices.where} names a group that is not there: download it again"
                )
        values = self.columns.codes(runs).astype(np.float32)
        values -= zeros[:, order]
        values *= scales[:, order]
        return values

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return (*self.columns.refs(), *([self.indices] if self.indices else []))


def gptq_matrix(
    tensors: Sequence[TensorRef],
    indices: TensorRef | None,
    size: tuple[int, int],
    act_order: bool,
    offset: int,
) -> Matrix:
    """The matrix of qweight, qzeros, scales and g_idx; raises CheckpointError when they do not fit each other."""
    weight, zeros, scales = tensors
    rows, cols = size
    words = weight.entry.shape[0] if len(weight.entry.shape) == 2 else 0
    bits = 32 * words // max(cols, 1)
    groups = scales.entry.shape[0] if len(scales.entry.shape) == 2 else 0
    _check(
        weight,
        bits in (2, 3, 4, 8)
        and rows * bits % 32 == cols * bits % 32 == 0
        and weight.entry.shape == (cols * bits // 32, rows)
        and zeros.entry.shape == (groups, rows * bits // 32)
        and _fits(tensors, (groups, rows))
        and (indices is None or (indices.entry.dtype, indices.entry.shape) == ("I32", (cols,))),
        f"GPTQ form of [{rows}, {cols}]",
    )
    columns = GptqColumns(weight, zeros, scales, rows, cols, bits, offset)
    return _grouped(columns, groups, indices, act_order)


def awq_matrix(tensors: Sequence[TensorRef], size: tuple[int, int]) -> Matrix:
    """The matrix of qweight, qzeros and scales; raises CheckpointError when they do not fit each other."""
    weight, zeros, scales = tensors
    rows, cols = size
    groups = scales.entry.shape[0] if len(scales.entry.shape) == 2 else 0
    _check(
        weight,
        rows % 8 == 0
        and weight.entry.shape == (cols, rows // 8)
        and zeros.entry.shape == (groups, rows // 8)
        and _fits(tensors, (groups, rows)),
        f"AWQ GEMM form of [{rows}, {cols}]",
    )
    return _grouped(AwqColumns(weight, zeros, scales, rows, cols, 4), groups, None, False)


def _grouped(
    columns: GptqColumns | AwqColumns, groups: int, indices: TensorRef | None, act_order: bool
) -> Matrix:
    rows, cols = columns.rows, columns.cols
    group = -(-cols // groups)
    if -(-cols // group) != groups:
        _check(columns.scales, False, f"scales of {cols} columns")
    scattered = act_order and groups > 1 and indices is not None
    if scattered or cols % group or group % 32:
        return ScatteredMatrix(columns, rows, cols, group, indices, scattered)
    return ColumnMatrix(columns, rows, cols, columns.bits, group, indices, checked=not act_order)


def _fits(tensors: Sequence[TensorRef], shape: tuple[int, int]) -> bool:
    weight, zeros, scales = (ref.entry for ref in tensors)
    return (
        shape[0] > 0
        and {weight.dtype, zeros.dtype} <= {"I32", "U32"}
        and scales.shape == shape
        and scales.dtype in FLOAT_TYPES
    )


def _check(ref: TensorRef, fits: bool, form: str) -> None:
    if not fits:
        raise CheckpointError(
            f"{ref.where} {ref.entry.dtype} {list(ref.entry.shape)} is no {form}: check config.json,"
            " or download both again"
        )


def _indices(ref: TensorRef) -> NDArray[np.int64]:
    return ref.read_all().view("<i4").astype(np.int64)
