"""The tile layout against a slow reading of docs/format.md, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.bundle.codecs import (
    DenseCodec,
    FfnLayout,
    Quantized,
    TileCodec,
    codec_from_json,
    codec_to_json,
    dequantize_ffn,
    pack_ffn,
    unpack_ffn,
)
from flashmoe.errors import BundleError

CODECS = [TileCodec(bits, group) for bits in (2, 3, 4, 6, 8) for group in (32, 64)]


def random_matrix(codec: TileCodec, rows: int, cols: int, seed: int = 0) -> Quantized:
    rng = np.random.default_rng(seed)
    groups = -(-cols // codec.group)
    codes = rng.integers(0, 1 << codec.bits, (rows, cols), dtype=np.uint8)
    scales, biases = rng.integers(0, 0x5000, (2, rows, groups), dtype=np.uint16)
    return Quantized(codes, scales, biases)


def spec_code(codec: TileCodec, tile: NDArray[np.uint8], row: int, col: int) -> int:
    """One code of one tile, straight from the words of the format."""

    def lane_bits(start: int, step: int, byte: int, shift: int, width: int) -> int:
        return int(tile[start + 64 * step + 4 * row + byte]) >> shift & ((1 << width) - 1)

    if codec.bits == 8:
        return lane_bits(0, col // 4, col % 4, 0, 8)
    if codec.bits in (4, 6):
        nibble = lane_bits(0, col // 8, col % 4, 4 * (col % 8 // 4), 4)
        if codec.bits == 4:
            return nibble
        return nibble | lane_bits(8 * codec.group, col // 16, col % 4, 2 * (col % 16 // 4), 2) << 4
    low = lane_bits(0, col // 16, col % 4, 2 * (col % 16 // 4), 2)
    if codec.bits == 2:
        return low
    return low | lane_bits(4 * codec.group, col // 32, col % 4, col % 32 // 4, 1) << 2


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_tile_bytes_are_those_of_the_format(codec: TileCodec) -> None:
    rows, cols = 21, 2 * codec.group
    matrix = random_matrix(codec, rows, cols)
    tiles = codec.pack(*matrix)
    assert tiles.shape == (2, 2, 16 * codec.group * codec.bits // 8 + 64)
    for row in range(rows):
        for col in range(cols):
            tile = tiles[row // 16, col // codec.group]
            assert spec_code(codec, tile, row % 16, col % codec.group) == matrix.codes[row, col]
    halves = np.ascontiguousarray(tiles[:, :, -64:]).view("<u2").reshape(2, 2, 2, 16)
    for row in range(rows):
        assert (halves[row // 16, :, 0, row % 16] == matrix.scales[row]).all()
        assert (halves[row // 16, :, 1, row % 16] == matrix.biases[row]).all()
    assert not halves[1, :, :, 5:].any(), "pad rows have scale and bias 0"


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_unpack_inverts_pack(codec: TileCodec, rows: int) -> None:
    matrix = random_matrix(codec, rows, 3 * codec.group)
    tiles = codec.pack(*matrix)
    assert tiles.nbytes == codec.matrix_nbytes(rows, 3 * codec.group)
    for packed, unpacked in zip(matrix, codec.unpack(tiles, rows, 3 * codec.group), strict=True):
        assert np.array_equal(packed, unpacked)


def bf16(raw: int) -> np.float32:
    return np.array([raw << 16], np.uint32).view(np.float32)[0]


def test_dequantize_multiplies_then_adds() -> None:
    codec = TileCodec(4, 32)
    matrix = random_matrix(codec, 17, 64)
    values = codec.dequantize(codec.pack(*matrix), 17, 64)
    for row, col in [(0, 0), (5, 33), (16, 63), (11, 31)]:
        scale, bias = bf16(int(matrix.scales[row, col // 32])), bf16(int(matrix.biases[row, col // 32]))
        assert values[row, col] == np.float32(np.float32(scale * matrix.codes[row, col]) + bias)


def test_f16_scales_are_read_as_f16() -> None:
    codec = TileCodec(8, 32, "f16")
    scales, biases = (np.array([[v]], np.float16).view(np.uint16) for v in (0.5, -3.0))
    codes = np.arange(32, dtype=np.uint8)[None]
    values = codec.dequantize(codec.pack(codes, scales, biases), 1, 32)
    assert np.array_equal(values[0], np.arange(32, dtype=np.float32) * 0.5 - 3)


@pytest.mark.parametrize("intermediate", [16, 32, 40, 64, 96])
def test_ffn_record_interleaves_gate_and_up(intermediate: int) -> None:
    layout = FfnLayout(128, intermediate, TileCodec(4, 64), TileCodec(3, 32))
    gate, up = (random_matrix(layout.gate_up, intermediate, 128, seed) for seed in (1, 2))
    down = random_matrix(layout.down, 128, intermediate, 3)
    record = pack_ffn(layout, gate, up, down)
    assert record.size == layout.nbytes
    assert layout.record_nbytes % 4096 == 0
    assert 0 <= layout.record_nbytes - layout.nbytes < 4096
    size = layout.gate_up.tile_nbytes
    gate_tiles, up_tiles = layout.gate_up.pack(*gate), layout.gate_up.pack(*up)
    assert np.array_equal(record[:size], gate_tiles[0, 0])
    assert np.array_equal(record[size : 2 * size], up_tiles[0, 0])
    assert np.array_equal(record[2 * size : 3 * size], gate_tiles[0, 1])
    got_gate, got_up, got_down = unpack_ffn(layout, record)
    assert np.array_equal(got_gate.codes, gate.codes)
    assert np.array_equal(got_up.codes, up.codes)
    assert np.array_equal(got_down.codes[:, :intermediate], down.codes)
    assert not got_down.codes[:, intermediate:].any(), "pad columns have code 0"
    values = dequantize_ffn(layout, record)
    assert [v.shape for v in values] == [(intermediate, 128), (intermediate, 128), (128, intermediate)]


@pytest.mark.parametrize("arguments", [(5, 64, "bf16"), (4, 128, "bf16"), (4, 64, "f32"), (0, 64, "bf16")])
def test_unknown_tile_codecs_are_refused(arguments: tuple[Any, Any, Any]) -> None:
    with pytest.raises(BundleError, match="convert the model again"):
        TileCodec(*arguments)


def test_columns_must_divide_into_groups() -> None:
    with pytest.raises(BundleError, match="does not divide"):
        TileCodec(4, 64).matrix_nbytes(16, 96)
    with pytest.raises(BundleError, match="does not divide"):
        FfnLayout(96, 64, TileCodec(4, 64), TileCodec(4, 64))


@pytest.mark.parametrize(
    "codec",
    [TileCodec(3, 32, "f16"), DenseCodec("bf16"), FfnLayout(64, 48, TileCodec(4, 64), TileCodec(8, 32))],
    ids=str,
)
def test_codecs_survive_json(codec: TileCodec | DenseCodec | FfnLayout) -> None:
    assert codec_from_json(codec_to_json(codec)) == codec
