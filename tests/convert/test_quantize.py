"""The affine fit: what comes back exactly, and how far off the rest may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.bundle import Quantized, TileCodec
from flashmoe.checkpoint.dtypes import f32_to_half, half_to_f32
from flashmoe.convert.quantize import quantize


def dequantized(matrix: Quantized, bits: int, group: int) -> NDArray[np.float32]:
    return TileCodec(bits, group).values(matrix)


def as_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return half_to_f32(f32_to_half(values, "bf16"), "bf16")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_on_a_grid_come_back_exactly(bits: int, group: int, sign: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (40, 2 * group)).astype(np.uint8)
    codes[:, ::group], codes[:, 1::group] = 0, (1 << bits) - 1
    scales = sign * as_bf16(rng.uniform(0.001, 0.02, (40, 2)).astype(np.float32))
    biases = as_bf16(rng.uniform(-0.5, 0.5, (40, 2)).astype(np.float32))
    values = codes * np.repeat(scales, group, 1) + np.repeat(biases, group, 1)
    assert np.array_equal(dequantized(quantize(values, bits, group), bits, group), values)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_group_of_one_value_is_exact(kind: type) -> None:
    rng = np.random.default_rng(0)
    column = rng.normal(0, 1, (50, 1)).astype(kind).astype(np.float32)
    column = column if kind is np.float16 else as_bf16(column)
    values = np.repeat(column, 64, axis=1)
    assert np.array_equal(dequantized(quantize(values, 4, 64), 4, 64), values)


def test_zeros_stay_zero() -> None:
    matrix = quantize(np.zeros((3, 64), np.float32), 4, 64)
    assert not matrix.codes.any()
    assert not dequantized(matrix, 4, 64).any()


def test_a_partial_last_group_uses_its_own_columns_only() -> None:
    values = np.random.default_rng(1).normal(0, 1, (5, 40)).astype(np.float32)
    matrix = quantize(values, 8, 32)
    assert matrix.codes.shape == (5, 40)
    assert matrix.scales.shape == (5, 2)
    assert np.array_equal(matrix.scales[:, 1], quantize(values[:, 32:], 8, 32).scales[:, 0])


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.floats(-30, 30), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_no_value_is_off_by_more_than_a_step(seed: int, bits: int, exponent: float, shift: float) -> None:
    values = np.random.default_rng(seed).normal(shift, 1, (4, 64)).astype(np.float32) * np.float32(
        2.0**exponent
    )
    error = np.abs(dequantized(quantize(values, bits, 64), bits, 64) - values)
    spread, largest = np.ptp(values, axis=1, keepdims=True), np.abs(values).max(axis=1, keepdims=True)
    assert (error <= spread / ((1 << bits) - 1) / 2 + (spread + largest) * 2.0**-8).all()
