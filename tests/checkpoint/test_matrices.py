"""Codes, sixteen-bit floats and row runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashmoe.checkpoint.dtypes import f32_to_half, half_to_f32, is_exact
from flashmoe.checkpoint.header import read_header
from flashmoe.checkpoint.matrices import FloatMatrix, TensorRef, unpack_codes
from flashmoe.errors import CheckpointError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_a_little_endian_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64), dtype=np.uint8)
    packed = np.zeros((3, 64 * bits // 8), np.uint8)
    for row in range(3):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[row]))
        packed[row] = np.frombuffer(stream.to_bytes(64 * bits // 8, "little"), np.uint8)
    assert np.array_equal(unpack_codes(packed, bits), codes)


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFF800000], np.uint32)
    rounded = f32_to_half(bits.view(np.float32), "bf16")
    assert rounded.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0xFF80]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_every_pattern_survives_the_way_through_f32(dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = half_to_f32(raw, dtype)  # type: ignore[arg-type]
    finite = ~np.isnan(values)
    assert np.array_equal(f32_to_half(values, dtype)[finite], raw[finite])  # type: ignore[arg-type]


def test_is_exact_sees_single_bits() -> None:
    assert is_exact(np.array([0.5, -1.0], np.float32), "bf16")
    assert not is_exact(np.array([0.5, 1.0009765625], np.float32), "bf16")
    assert is_exact(np.array([1.0009765625], np.float32), "f16")
    assert not is_exact(np.array([1e-30], np.float32), "f16")


def float_matrix(path: Path, values: np.ndarray) -> FloatMatrix:
    save_file({"w": values}, path)
    rows, cols = int(np.prod(values.shape[:-1])), values.shape[-1]
    return FloatMatrix(TensorRef(read_header(path).tensors["w"], path), rows, cols)


def test_runs_pick_rows_in_their_order(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    matrix = float_matrix(tmp_path / "m.safetensors", values)
    picked = matrix.read_values([(10, 2), (0, 1), (4, 3)])
    assert np.array_equal(picked, values.reshape(12, 5)[[10, 11, 0, 4, 5, 6]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    matrix = float_matrix(tmp_path / "m.safetensors", np.array([[1, bad, 2]], np.float32))
    with pytest.raises(CheckpointError, match="'w' holds NaN or infinity"):
        matrix.read_values([(0, 1)])
