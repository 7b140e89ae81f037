"""How a weight lies in a bundle: the tile codec, the dense codec and the FFN record (docs/format.md).

Everything here is bit layout on numpy arrays; no file is touched.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32, U16, HalfType, half_to_f32
from flashmoe.errors import BundleError

U8 = NDArray[np.uint8]

TILE_ROWS = 16
TILE_BITS = (2, 3, 4, 6, 8)  # the widths of codes that the kernels read
RECORD_ALIGN = 4096  # direct I/O wants offset, size and address on the drive's largest block
_MAX_GLU = 1e6  # of a GLU's numbers, which are 1.702 and 7
_MAX_DIM = 1 << 31  # no real model comes near; keeps sizes computed from a damaged manifest finite


# FP4 (e2m1) in halves, raised by 12 so that no entry is negative: 0 .5 1 1.5 2 3 4 6, then their negatives.
FP4_TABLE = (12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)
FP4_OFFSET = 12
_TABLE_SIZE, _MOST_ENTRY = 16, 127  # a larger entry would saturate AVX2's sums of two products


class Quantized(NamedTuple):
    """An affine matrix: w[r, c] = scale[r, c // group] * codes[r, c] + bias[r, c // group].

    In a codec with a table, table[codes[r, c]] takes the place of the code.
    """

    codes: U8  # [rows, cols]
    scales: U16  # [rows, cols // group], raw 16-bit patterns
    biases: U16  # [rows, cols // group], raw 16-bit patterns


def ceil_div(value: int, step: int) -> int:
    """How many steps cover ``value``."""
    return -(-value // step)


def align_up(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is not below ``value``."""
    return ceil_div(value, step) * step


@dataclass(frozen=True)
class TileCodec:
    """Affine codes in tiles of 16 rows x ``group`` columns.

    ``table``: what each of the 16 codes of four bits stands for, 0 to 127; None for itself.
    Raises BundleError when bits, group, scale type or table are none of those the format has.
    """

    bits: int
    group: int
    scale_dtype: HalfType = "bf16"
    table: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.table is not None and (
            self.bits != 4
            or len(self.table) != _TABLE_SIZE
            or any(type(entry) is not int or not 0 <= entry <= _MOST_ENTRY for entry in self.table)
        ):
            raise BundleError(
                f"a table of {_TABLE_SIZE} entries from 0 to {_MOST_ENTRY} goes with 4 bits: convert the model again"
            )
        if (
            self.bits not in TILE_BITS
            or self.group not in (32, 64)
            or self.scale_dtype not in ("bf16", "f16")
        ):
            raise BundleError(
                f"no tile codec has {self.bits!r} bits, groups of {self.group!r} and {self.scale_dtype!r}"
                ": convert the model again"
            )

    @property
    def tile_nbytes(self) -> int:
        """Payload of 16 x group codes, then 16 scales and 16 biases of two bytes."""
        return TILE_ROWS * self.group * self.bits // 8 + 4 * TILE_ROWS

    def row_tiles(self, rows: int) -> int:
        """Tiles that cover ``rows`` rows."""
        return ceil_div(rows, TILE_ROWS)

    def matrix_shape(self, rows: int, cols: int) -> tuple[int, int, int]:
        """[row_tiles, groups, tile_nbytes]; raises BundleError when cols is no multiple of the group."""
        if cols % self.group:
            raise BundleError(f"a matrix of {cols} columns does not divide into groups of {self.group}")
        return self.row_tiles(rows), cols // self.group, self.tile_nbytes

    def matrix_nbytes(self, rows: int, cols: int) -> int:
        """Bytes of the whole matrix, pad rows included."""
        row_tiles, groups, tile_nbytes = self.matrix_shape(rows, cols)
        return row_tiles * groups * tile_nbytes

    def pack(self, codes: U8, scales: U16, biases: U16) -> U8:
        """Tiles u8 [row_tiles, groups, tile_nbytes] of codes [rows, cols]; pad rows are zero.

        Codes must be below 2**bits (unchecked); raises BundleError when the shapes disagree.
        """
        rows, cols = codes.shape
        row_tiles, groups, tile_nbytes = self.matrix_shape(rows, cols)
        if scales.shape != (rows, groups) or biases.shape != (rows, groups):
            raise BundleError(
                f"scales {scales.shape} or biases {biases.shape} do not fit codes {codes.shape}"
            )
        tiles = np.empty((row_tiles, groups, tile_nbytes), np.uint8)
        grid: U8 = _pad_rows(codes, row_tiles).reshape(row_tiles, TILE_ROWS, groups, self.group)
        start = 0
        for shift, width in self._planes():
            end = start + TILE_ROWS * self.group * width // 8
            plane = grid if self.bits == width else (grid >> np.uint8(shift)) & np.uint8((1 << width) - 1)
            tiles[:, :, start:end] = _pack_plane(plane, width)
            start = end
        for values in (scales, biases):
            block = _pad_rows(values, row_tiles).reshape(row_tiles, TILE_ROWS, groups).transpose(0, 2, 1)
            end = start + 2 * TILE_ROWS
            tiles[:, :, start:end] = np.ascontiguousarray(block, dtype="<u2").view(np.uint8)
            start = end
        return tiles

    def unpack(self, tiles: U8, rows: int, cols: int) -> Quantized:
        """The inverse of pack; ``tiles`` may have any shape with the right number of bytes."""
        row_tiles, groups, tile_nbytes = self.matrix_shape(rows, cols)
        tiles = np.ascontiguousarray(tiles).reshape(row_tiles, groups, tile_nbytes)
        codes = np.zeros((row_tiles, TILE_ROWS, groups, self.group), np.uint8)
        start = 0
        for shift, width in self._planes():
            end = start + TILE_ROWS * self.group * width // 8
            codes |= _unpack_plane(tiles[:, :, start:end], width) << shift
            start = end
        halves = np.ascontiguousarray(tiles[:, :, start:]).view("<u2").astype(np.uint16, copy=False)
        halves = halves.reshape(row_tiles, groups, 2, TILE_ROWS).transpose(2, 0, 3, 1)
        scales, biases = np.ascontiguousarray(halves).reshape(2, row_tiles * TILE_ROWS, groups)
        return Quantized(codes.reshape(-1, cols)[:rows], scales[:rows], biases[:rows])

    def dequantize(self, tiles: U8, rows: int, cols: int) -> F32:
        """float32 [rows, cols]: f32(scale) * code, then + f32(bias), each rounded to float32."""
        return self.values(self.unpack(tiles, rows, cols))

    def values(self, matrix: Quantized) -> F32:
        """float32 [rows, cols] of an unpacked matrix."""
        rows, cols = matrix.codes.shape
        codes = matrix.codes if self.table is None else np.array(self.table, np.uint8)[matrix.codes]
        out = codes.reshape(rows, cols // self.group, self.group).astype(np.float32)
        out *= half_to_f32(matrix.scales, self.scale_dtype)[:, :, None]
        out += half_to_f32(matrix.biases, self.scale_dtype)[:, :, None]
        return out.reshape(rows, cols)

    def _planes(self) -> tuple[tuple[int, int], ...]:
        """(shift, width) of the bit fields stored one after another: three bits are two plus one, six four plus two."""
        split = {3: ((0, 2), (2, 1)), 6: ((0, 4), (4, 2))}
        return split.get(self.bits, ((0, self.bits),))


@dataclass(frozen=True)
class DenseCodec:
    """Plain row-major values: ``f32``, ``bf16`` or ``f16``."""

    dtype: str = "f32"

    def __post_init__(self) -> None:
        if self.dtype not in ("f32", "bf16", "f16"):
            raise BundleError(f"no dense codec has the type {self.dtype!r}: convert the model again")

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return 4 if self.dtype == "f32" else 2


@dataclass(frozen=True)
class ClampedGlu:
    """(u + 1) * g * sigmoid(alpha * g) with g = min(gate, limit), u = up within +-limit (gpt-oss).

    Raises BundleError for numbers that are not finite and positive.
    """

    alpha: float
    limit: float

    def __post_init__(self) -> None:
        if not (0 < self.alpha <= _MAX_GLU and 0 < self.limit <= _MAX_GLU):
            raise BundleError(
                f"a GLU of alpha {self.alpha} and limit {self.limit} is impossible: convert again"
            )


class FfnBiases(NamedTuple):
    """float32 biases of gate and up [I] and of down [H]."""

    gate: F32
    up: F32
    down: F32


@dataclass(frozen=True)
class FfnLayout:
    """One expert (routed or shared) or dense FFN: gate and up interleaved tile by tile, then down, then biases.

    ``glu`` joins gate and up: None for silu(gate) * up.  ``biased``: the record holds biases.
    Raises BundleError when ``hidden`` is no multiple of the gate/up group or a size is not positive.
    """

    hidden: int
    intermediate: int
    gate_up: TileCodec
    down: TileCodec
    glu: ClampedGlu | None = None
    biased: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.hidden < _MAX_DIM and 0 < self.intermediate < _MAX_DIM):
            raise BundleError(
                f"an FFN of {self.hidden} x {self.intermediate} is impossible: convert the model again"
            )
        if self.hidden % self.gate_up.group:
            raise BundleError(
                f"hidden size {self.hidden} does not divide into groups of {self.gate_up.group}"
            )

    @property
    def intermediate_padded(self) -> int:
        """Columns of the stored down matrix: ``intermediate`` rounded up to the down group."""
        return align_up(self.intermediate, self.down.group)

    @property
    def gate_up_nbytes(self) -> int:
        """Bytes of the interleaved gate and up tiles."""
        return 2 * self.gate_up.matrix_nbytes(self.intermediate, self.hidden)

    @property
    def down_offset(self) -> int:
        """Where the down tiles start in the record."""
        return self.gate_up_nbytes

    @property
    def bias_offset(self) -> int:
        """Where the down tiles end in the record, and the biases start."""
        return self.gate_up_nbytes + self.down.matrix_nbytes(self.hidden, self.intermediate_padded)

    @property
    def bias_rows(self) -> tuple[int, int, int]:
        """Stored biases of gate, up and down: their rows rounded up to whole row tiles; zeros where there are none."""
        if not self.biased:
            return 0, 0, 0
        wide, narrow = align_up(self.intermediate, TILE_ROWS), align_up(self.hidden, TILE_ROWS)
        return wide, wide, narrow

    @property
    def nbytes(self) -> int:
        """Bytes of the record without its final padding."""
        return self.bias_offset + 4 * sum(self.bias_rows)

    @property
    def record_nbytes(self) -> int:
        """Bytes of a routed expert's record: ``nbytes`` rounded up to 4096."""
        return align_up(self.nbytes, RECORD_ALIGN)


Codec = TileCodec | DenseCodec | FfnLayout


def pack_ffn(
    layout: FfnLayout, gate: Quantized, up: Quantized, down: Quantized, biases: FfnBiases | None = None
) -> U8:
    """The record u8 [layout.nbytes] of gate and up [I, H] and down [H, I or I_pad]; biases where it has them."""
    record = np.zeros(layout.nbytes, np.uint8)
    shape = layout.gate_up.matrix_shape(layout.intermediate, layout.hidden)
    pairs = record[: layout.gate_up_nbytes].reshape(shape[0], shape[1], 2, shape[2])
    pairs[:, :, 0] = layout.gate_up.pack(*gate)
    pairs[:, :, 1] = layout.gate_up.pack(*up)
    record[layout.down_offset : layout.bias_offset] = layout.down.pack(*_pad_cols(down, layout)).reshape(-1)
    if layout.biased:
        assert biases is not None
        for room, values in zip(_bias_views(layout, record), biases, strict=True):
            room[: len(values)] = values
    return record


def unpack_biases(layout: FfnLayout, record: U8) -> FfnBiases:
    """The biases of a record; zeros where it has none."""
    sizes = layout.intermediate, layout.intermediate, layout.hidden
    if not layout.biased:
        return FfnBiases(*(np.zeros(n, np.float32) for n in sizes))
    views = _bias_views(layout, record)
    return FfnBiases(*(view[:n] for view, n in zip(views, sizes, strict=True)))


def _bias_views(layout: FfnLayout, record: U8) -> list[F32]:
    values: F32 = record[layout.bias_offset : layout.nbytes].view("<f4")
    ends = np.cumsum(layout.bias_rows)[:2]
    return np.split(values, ends)


def unpack_ffn(layout: FfnLayout, record: U8) -> tuple[Quantized, Quantized, Quantized]:
    """gate, up [I, H] and down [H, I_pad] of a record; bytes beyond layout.nbytes are ignored."""
    shape = layout.gate_up.matrix_shape(layout.intermediate, layout.hidden)
    pairs = record[: layout.gate_up_nbytes].reshape(shape[0], shape[1], 2, shape[2])
    gate, up = (layout.gate_up.unpack(pairs[:, :, i], layout.intermediate, layout.hidden) for i in (0, 1))
    down = record[layout.down_offset : layout.bias_offset]
    return gate, up, layout.down.unpack(down, layout.hidden, layout.intermediate_padded)


def dequantize_ffn(layout: FfnLayout, record: U8) -> tuple[F32, F32, F32]:
    """float32 gate [I, H], up [I, H] and down [H, I] of a record (pad columns dropped)."""
    gate, up, down = unpack_ffn(layout, record)
    down_values = layout.down.values(down)[:, : layout.intermediate]
    return layout.gate_up.values(gate), layout.gate_up.values(up), np.ascontiguousarray(down_values)


def codec_to_json(codec: Codec) -> dict[str, Any]:
    """The manifest's form of a codec: its fields and a ``kind``."""
    if isinstance(codec, FfnLayout):
        body: dict[str, Any] = {
            "kind": "ffn",
            "hidden": codec.hidden,
            "intermediate": codec.intermediate,
            "gate_up": codec_to_json(codec.gate_up),
            "down": codec_to_json(codec.down),
            "down_offset": codec.down_offset,
        }
        if codec.glu is not None:
            body["glu"] = asdict(codec.glu)
        return body | {"biased": True} if codec.biased else body
    body = {"kind": "tile" if isinstance(codec, TileCodec) else "dense", **asdict(codec)}
    table = body.pop("table", None)
    return body if table is None else body | {"table": list(table)}


def is_extended(codec: Codec) -> bool:
    """True for what readers of format versions 1 and 2 would misread: tables, other GLUs, biases."""
    if isinstance(codec, FfnLayout):
        return codec.biased or codec.glu is not None or is_extended(codec.gate_up) or is_extended(codec.down)
    return isinstance(codec, TileCodec) and codec.table is not None


def codec_from_json(value: object) -> Codec:
    """The inverse of codec_to_json; raises BundleError for anything else."""
    if not isinstance(value, dict):
        raise BundleError(f"the codec {value!r} is not an object: convert the model again")
    kind = value.get("kind")
    if kind == "tile":
        return _tile_from_json(value)
    if kind == "dense":
        return DenseCodec(_checked(value, "dtype", str))
    if kind == "ffn":
        return ffn_from_json(value)
    raise BundleError(f"the codec kind {kind!r} is unknown: this bundle needs a newer flashmoe")


def ffn_from_json(value: object) -> FfnLayout:
    """An FfnLayout from the manifest; raises BundleError when a field is missing or of a wrong type."""
    if not isinstance(value, dict):
        raise BundleError(f"the FFN layout {value!r} is not an object: convert the model again")
    hidden, intermediate = _checked(value, "hidden", int), _checked(value, "intermediate", int)
    biased = value.get("biased", False)
    if not isinstance(biased, bool):
        raise BundleError(f"the codec field 'biased' is {biased!r}: convert the model again")
    return FfnLayout(
        hidden,
        intermediate,
        _tile_from_json(value.get("gate_up")),
        _tile_from_json(value.get("down")),
        _glu_from_json(value.get("glu")),
        biased,
    )


def _glu_from_json(value: object) -> ClampedGlu | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BundleError(f"the GLU {value!r} is not an object: convert the model again")
    return ClampedGlu(_checked(value, "alpha", float), _checked(value, "limit", float))


def _tile_from_json(value: object) -> TileCodec:
    if not isinstance(value, dict):
        raise BundleError(f"the tile codec {value!r} is not an object: convert the model again")
    table = value.get("table")
    return TileCodec(
        _checked(value, "bits", int),
        _checked(value, "group", int),
        _checked(value, "scale_dtype", str),
        tuple(_checked(value, "table", list)) if table is not None else None,
    )


def _checked(value: dict[str, Any], key: str, kind: type) -> Any:
    field = value.get(key)
    if not isinstance(field, kind) or isinstance(field, bool):
        raise BundleError(f"the codec field {key!r} is {field!r}: convert the model again")
    return field


def _pad_rows(values: NDArray[Any], row_tiles: int) -> NDArray[Any]:
    missing = row_tiles * TILE_ROWS - values.shape[0]
    return np.pad(values, ((0, missing), (0, 0))) if missing else values


def _pad_cols(matrix: Quantized, layout: FfnLayout) -> Quantized:
    """Zero columns, and groups of zero scale and bias, up to I_pad."""
    missing = layout.intermediate_padded - matrix.codes.shape[1]
    if not missing:
        return matrix
    groups = layout.intermediate_padded // layout.down.group - matrix.scales.shape[1]
    codes = np.pad(matrix.codes, ((0, 0), (0, missing)))
    scales, biases = (np.pad(v, ((0, 0), (0, groups))) for v in (matrix.scales, matrix.biases))
    return Quantized(codes, scales, biases)


def _pack_plane(codes: U8, width: int) -> U8:
    """Bytes [row_tiles, groups, n] of codes [row_tiles, 16, groups, group] below 2**width.

    A 64-byte step covers 32 // width columns; field j of byte b is column 4j + b of the step.
    """
    row_tiles, _, groups, group = codes.shape
    fields = 8 // width
    split = codes.reshape(row_tiles, TILE_ROWS, groups, group // (4 * fields), fields, 4)
    lanes = np.ascontiguousarray(split[..., 0, :])
    for j in range(1, fields):
        lanes |= split[..., j, :] << (width * j)
    return lanes.transpose(0, 2, 3, 1, 4).reshape(row_tiles, groups, -1)


def _unpack_plane(plane: U8, width: int) -> U8:
    """Codes [row_tiles, 16, groups, group] of bytes [row_tiles, groups, n]."""
    row_tiles, groups, nbytes = plane.shape
    fields = 8 // width
    lanes = plane.reshape(row_tiles, groups, -1, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
    mask = (1 << width) - 1
    split = np.stack([(lanes >> (width * j)) & mask for j in range(fields)], axis=4)
    return split.reshape(row_tiles, TILE_ROWS, groups, nbytes * fields // TILE_ROWS)
