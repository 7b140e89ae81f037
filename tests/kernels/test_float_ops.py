"""Norms, sigmoid, router and sums against numpy on odd shapes and extreme inputs, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import Ops

TOKENS = (1, 2, 7, 65)
WIDTHS = (1, 15, 16, 123, 130, 576)  # 64 floats are one round of the four chains
EPS = 1e-6
F = np.float32
Check = Callable[..., Any]


def rows(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Ordinary rows, then one of zeros, one that eps outweighs, one whose squares are near the end of float32."""
    x = rng.normal(size=(tokens, width)).astype(F)
    for row, factor in zip(range(1, tokens), (0.0, 1e-6, 1e15, 1e-30), strict=False):
        x[row] *= F(factor)
    return x


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rms_norm(tokens: int, width: int, agrees: Check, rng: np.random.Generator) -> None:
    x, w = rows(rng, tokens, width), rng.normal(size=width).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full_like(x, np.nan)
        ops.rms_norm(x, w, EPS, out)
        return [out]

    (out,) = agrees("rms_norm", run)
    if tokens > 1:
        assert not out[1].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_add_rms_norm_adds_in_place(tokens: int, width: int, agrees: Check, rng: np.random.Generator) -> None:
    x, delta = rows(rng, tokens, width), rows(rng, tokens, width)
    w = rng.normal(size=width).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        residual, out = x.copy(), np.full_like(x, np.nan)
        ops.add_rms_norm(residual, delta, w, EPS, out)
        return [out, residual]

    _, residual = agrees("add_rms_norm", run)
    np.testing.assert_array_equal(residual, x + delta)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gated_rms_norm(tokens: int, width: int, agrees: Check, rng: np.random.Generator) -> None:
    heads = 3
    o = rows(rng, tokens * heads, width).reshape(tokens, heads, width)
    z = (4 * rng.normal(size=o.shape)).astype(F)
    z[:, 0] *= 20  # gates of 80 and far below
    w = rng.normal(size=width).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full((tokens, heads * width), np.nan, F)
        ops.gated_rms_norm(o, z, w, EPS, out)
        return [out]

    agrees("gated_rms_norm", run)


def test_rows_do_not_depend_on_their_neighbours(backends: list[CpuOps], rng: np.random.Generator) -> None:
    x, z = (rng.normal(size=(65, 123)).astype(F) for _ in range(2))
    w = rng.normal(size=123).astype(F)
    for ops in backends:
        whole, single = np.empty((2, *x.shape), F), np.empty((2, *x.shape), F)
        ops.rms_norm(x, w, EPS, whole[0])
        ops.gated_rms_norm(x, z, w, EPS, whole[1])
        for t in range(len(x)):
            ops.rms_norm(x[t : t + 1], w, EPS, single[0, t])
            ops.gated_rms_norm(x[t : t + 1], z[t : t + 1], w, EPS, single[1, t])
        np.testing.assert_array_equal(whole, single)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 333])
def test_sigmoid_in_place(size: int, agrees: Check, rng: np.random.Generator) -> None:
    x = (30 * rng.normal(size=size)).astype(F)
    x[:7] = [0.0, 80.0, -80.0, 1000.0, -1000.0, 1e-30, -0.0][:size]

    def run(ops: Ops) -> list[np.ndarray]:
        out = x.copy()
        ops.sigmoid(out, out)
        return [out]

    (out,) = agrees("sigmoid", run)
    assert out[0] == 0.5


def test_not_a_number_goes_through(backends: list[CpuOps]) -> None:
    """A broken weight must end as an error at the sampler, not as a plausible token."""
    x = np.ones((1, 40), F)
    x[0, 33] = np.nan
    for ops in backends:
        out = np.zeros_like(x)
        ops.sigmoid(x, out)
        assert np.flatnonzero(np.isnan(out)).tolist() == [33]
        ops.gated_rms_norm(np.ones_like(x), x, np.ones(40, F), EPS, out)
        assert np.flatnonzero(np.isnan(out)).tolist() == [33]
        ops.rms_norm(x, np.ones(40, F), EPS, out)
        assert np.isnan(out).all()


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 4), (8, 8), (33, 5), (512, 10)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_route(tokens: int, experts: int, k: int, agrees: Check, rng: np.random.Generator) -> None:
    logits = (3 * rng.normal(size=(tokens, experts))).astype(F)
    logits[0] = rng.uniform(-80, 80, size=experts)

    def run(ops: Ops) -> list[np.ndarray]:
        chosen, weights = np.full((tokens, k), -1, np.int32), np.full((tokens, k), np.nan, F)
        ops.route(logits, k, chosen, weights)
        return [weights, chosen]

    weights, chosen = agrees("route", run)
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 8), (33, 5), (512, 10)])
def test_route_over_all_experts(experts: int, k: int, agrees: Check, rng: np.random.Generator) -> None:
    logits = (3 * rng.normal(size=(5, experts))).astype(F)
    logits[0] = rng.uniform(-80, 80, size=experts)

    def run(ops: Ops) -> list[np.ndarray]:
        chosen, weights = np.full((5, k), -1, np.int32), np.full((5, k), np.nan, F)
        ops.route(logits, k, chosen, weights, False)
        return [weights, chosen]

    weights, chosen = agrees("route", run)
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :k])
    assert (weights.sum(1) <= 1 + 1e-6).all()
    if k == experts:
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_route_gives_ties_to_the_lower_expert(k: int, agrees: Check, rng: np.random.Generator) -> None:
    logits = rng.integers(-2, 2, size=(50, 20)).astype(F)  # four values for twenty experts
    logits[0], logits[1, ::2], logits[1, 1::2] = 7.0, 0.0, -0.0

    def run(ops: Ops) -> list[np.ndarray]:
        chosen, weights = np.empty((50, k), np.int32), np.empty((50, k), F)
        ops.route(logits, k, chosen, weights)
        return [weights, chosen]

    weights, chosen = agrees("route", run)
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :k])
    for row in (0, 1):
        assert chosen[row].tolist() == list(range(k))
        np.testing.assert_allclose(weights[row], 1 / k, rtol=1e-6)


def test_route_refuses_what_is_not_a_number(backends: list[CpuOps]) -> None:
    for place in (0, 3, 7):
        logits = np.zeros((2, 8), F)
        logits[1, place] = np.nan
        for ops in backends:
            with pytest.raises(RuntimeError, match="not a number"):
                ops.route(logits, 3, np.empty((2, 3), np.int32), np.empty((2, 3), F))


@pytest.mark.parametrize("width", [1, 123, 1024, 1300])
def test_combine_adds_in_the_order_given(width: int, agrees: Check, rng: np.random.Generator) -> None:
    y = rng.normal(size=(6, width)).astype(F)
    places, factors = np.array([1, 0, 1, 1, 0], np.int32), rng.random(5).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.ones((3, width), F)
        ops.combine(y, places, factors, out)
        return [out]

    (out,) = agrees("combine", run)
    assert (out[2] == 1).all()
    # One rounding a step: the product is exact in float64.
    want = np.ones((3, width))
    for values, row, factor in zip(y, places, factors, strict=False):
        want[row] = (factor * values.astype(np.float64) + want[row]).astype(F)
    assert (out == want).mean() > 0.999  # float64 then float32 may round twice


def test_empty_calls_change_nothing(backends: list[CpuOps]) -> None:
    nothing, w, ids = np.empty((0, 16), F), np.ones(16, F), np.empty((0, 2), np.int32)
    for ops in backends:
        ops.rms_norm(nothing, w, EPS, nothing.copy())
        ops.add_rms_norm(nothing, nothing, w, EPS, nothing.copy())
        ops.gated_rms_norm(nothing, nothing, w, EPS, nothing.copy())
        ops.sigmoid(nothing, nothing)
        ops.route(nothing, 2, ids, np.empty((0, 2), F))
        out = np.ones((2, 16), F)
        ops.combine(nothing, ids.reshape(-1), np.empty(0, F), out)
        assert (out == 1).all()
