"""Least-squares fits: never worse than the range, better where it matters, blind to nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe.bundle import TileCodec
from flashmoe.convert.fit import fit
from flashmoe.convert.quantize import quantize

F32 = NDArray[np.float32]


def error(values: F32, bits: int, matrix: object, weights: F32 | float = 1.0) -> float:
    found = TileCodec(bits, 64).values(matrix)  # type: ignore[arg-type]
    return float((((found - values).astype(np.float64)) ** 2 * weights).sum())


def brute_force(values: F32, bits: int) -> float:
    """The least square error over a fine lattice of scales and biases, float64."""
    low, high = values.min(), values.max()
    top, best = (1 << bits) - 1, np.inf
    for share in np.linspace(0.3, 1.05, 120):
        scale = (high - low) * share / top
        for bias in np.linspace(low - scale, high - scale * top + scale, 120):
            codes = np.clip(np.rint((values - bias) / scale), 0, top)
            best = min(best, float(((values - scale * codes - bias) ** 2).sum()))
    return best


@pytest.mark.parametrize("bits", [2, 3])
def test_it_comes_near_the_best_grid(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for draw in (rng.normal(size=(8, 64)), rng.standard_t(3, (8, 64)), rng.uniform(-1, 1, (8, 64))):
        values = draw.astype(np.float32)
        found = error(values, bits, fit(values, bits, 64))
        best = sum(brute_force(row.astype(np.float64), bits) for row in values)
        assert best * 0.98 <= found <= best * 1.1


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 6]), st.floats(-30, 30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_is_never_worse_than_the_range(seed: int, bits: int, exponent: float, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(3, (5, 128)) * 2.0**exponent).astype(np.float32)
    weights = rng.lognormal(0, 2, 128).astype(np.float32) if weighted else None
    scale = 1.0 if weights is None else weights
    better, plain = fit(values, bits, 64, weights), quantize(values, bits, 64)
    # The comparison is made in float32, group by group.
    assert error(values, bits, better, scale) <= error(values, bits, plain, scale) * (1 + 1e-4)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.6), (3, 0.85), (4, 0.95)])
def test_it_halves_the_error_of_two_bits(bits: int, ratio: float) -> None:
    values = np.random.default_rng(0).normal(0, 0.02, (256, 256)).astype(np.float32)
    assert error(values, bits, fit(values, bits, 64)) < ratio * error(
        values, bits, quantize(values, bits, 64)
    )


def test_important_columns_are_nearer() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(64, 64)).astype(np.float32)
    weights = np.where(np.arange(64) % 8 == 0, 100, 1).astype(np.float32)
    plain, weighted = fit(values, 2, 64), fit(values, 2, 64, weights)
    assert error(values, 2, weighted, weights) < 0.7 * error(values, 2, plain, weights)
    assert error(values, 2, weighted) > error(values, 2, plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("group", [32, 64])
def test_values_on_a_grid_come_back_exactly(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (40, 2 * group)).astype(np.float32)
    codes[:, ::group], codes[:, 1::group] = 0, (1 << bits) - 1
    values = codes * np.float32(0.5) - np.float32(3)
    assert np.array_equal(TileCodec(bits, group).values(fit(values, bits, group)), values)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_flat_groups_and_zero_weights(value: float) -> None:
    values = np.full((3, 64), value, np.float32)
    assert np.array_equal(TileCodec(2, 64).values(fit(values, 2, 64, np.zeros(64, np.float32))), values)


def test_a_part_of_a_group_and_of_a_block_is_fitted_alone() -> None:
    values = np.random.default_rng(2).normal(size=(3000, 40)).astype(np.float32)
    whole = fit(values, 3, 32)
    assert whole.codes.shape == (3000, 40)
    assert whole.scales.shape == (3000, 2)
    for rows in (slice(0, 1), slice(1777, 1790)):
        part = fit(values[rows], 3, 32)
        assert all(np.array_equal(a[rows], b) for a, b in zip(whole, part, strict=True))
