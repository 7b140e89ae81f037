"""Attention without gates and norms, with windows and sinks: against the reference, and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe.kernels.kv_cache import cache_shape, load_keys, store_keys, store_values
from flashmoe.kernels.ops import Ops

F = np.float32
Check = Callable[..., Any]
DTYPES = [np.float16, np.float32, np.int8]
# heads, key/value heads, head dimension; the last is gpt-oss's ratio, the one before ends within a vector.
SHAPES = [(2, 1, 16), (20, 2, 24), (16, 2, 64)]


def filled(rng: np.random.Generator, positions: int, kv_heads: int, dim: int, dtype: Any) -> list[np.ndarray]:
    caches = [np.zeros(cache_shape(kv_heads, positions, dim, dtype), dtype) for _ in range(2)]
    for cache, store in zip(caches, (store_keys, store_values), strict=True):
        store(cache, 0, rng.normal(size=(positions, kv_heads, dim)).astype(F))
    return caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("window", [0, 1, 15, 16, 128, 300])
def test_windows_and_sinks(
    window: int, heads: int, kv_heads: int, dim: int, dtype: Any, agrees: Check, rng: np.random.Generator
) -> None:
    for context in (1, 16, 130, 256, 257, 600):
        keys, values = filled(rng, context, kv_heads, dim, dtype)
        sinks = rng.normal(scale=3, size=heads).astype(F)
        for tokens in sorted({1, min(7, context)}):
            q = rng.normal(size=(tokens, heads, dim)).astype(F)
            gate = rng.normal(size=(tokens, heads, 2 * dim)).astype(F)

            def run(
                ops: Ops,
                at: int = context - tokens,
                q: Any = q,
                gate: Any = gate,
                cache: Any = (keys, values),
                sinks: Any = sinks,
            ) -> list[np.ndarray]:
                outs = [np.full((len(q), heads * dim), np.nan, F) for _ in range(3)]
                ops.attention(q, *cache, at, None, outs[0], window)
                ops.attention(q, *cache, at, None, outs[1], window, sinks)
                ops.attention(q, *cache, at, gate, outs[2], window, sinks)
                return outs

            agrees("attention", run)


def test_what_a_window_hides_does_not_count(same_bits: Check, rng: np.random.Generator) -> None:
    keys, values = filled(rng, 200, 1, 16, np.float32)
    q = rng.normal(size=(1, 2, 16)).astype(F)

    def run(ops: Ops, shift: float) -> list[np.ndarray]:
        # Positions 0 to 149 lie before a window of 50, some of them in the block of 16 where it begins.
        cache = keys.copy(), values.copy()
        for plain in cache:
            plain[:, :9] += F(shift)
        plain_keys = load_keys(cache[0], 16)
        assert plain_keys.shape[1] == 208
        out = np.full((1, 32), np.nan, F)
        ops.attention(q, *cache, 199, None, out, 50)
        return [out]

    np.testing.assert_array_equal(
        same_bits(lambda ops: run(ops, 0.0))[0], same_bits(lambda ops: run(ops, 7.0))[0]
    )


@pytest.mark.parametrize("sink", [-1e4, 0.0, 60.0, 1e4])
def test_a_sink_takes_its_share(sink: float, agrees: Check) -> None:
    """Scores of zero and values of one: what is left is n / (n + e^sink)."""
    keys, values = np.zeros((1, 3, 256), F), np.ones((1, 3, 256), F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full((1, 16), np.nan, F)
        ops.attention(np.zeros((1, 1, 16), F), keys, values, 40, None, out, 0, np.array([sink], F))
        return [out]

    (out,) = agrees("attention", run)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, 41 / (41 + np.exp(np.float64(sink))), rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [5, 128])
def test_a_sequence_in_pieces_gives_the_same_bits(
    window: int, dtype: Any, same_bits: Check, rng: np.random.Generator
) -> None:
    tokens, heads = 400, 6
    keys, values = filled(rng, tokens, 2, 32, dtype)
    q, sinks = rng.normal(size=(tokens, heads, 32)).astype(F), rng.normal(size=heads).astype(F)

    def run(ops: Ops, step: int) -> list[np.ndarray]:
        out = np.full((tokens, heads * 32), np.nan, F)
        for t in range(0, tokens, step):
            part = slice(t, t + step)
            ops.attention(q[part], keys, values, t, None, out[part], window, sinks)
        return [out]

    whole = same_bits(lambda ops: run(ops, tokens))
    for step in (1, 7, 257):
        np.testing.assert_array_equal(whole[0], same_bits(lambda ops, step=step: run(ops, step))[0])


@pytest.mark.parametrize("rotated", [0, 16])
def test_preparing_without_norms_and_gates(rotated: int, agrees: Check, rng: np.random.Generator) -> None:
    angles = rng.normal(size=(40, rotated // 2))
    cos, sin = np.cos(angles).astype(F), np.sin(angles).astype(F)
    q, k, v = (rng.normal(size=(20, n * 24)).astype(F) for n in (4, 2, 2))

    def run(ops: Ops) -> list[np.ndarray]:
        caches = [np.zeros(cache_shape(2, 40, 24, F), F) for _ in range(2)]
        out = np.full((20, 4, 24), np.nan, F)
        ops.attention_prepare(q, k, v, None, None, 1e-6, cos, sin, 9, out, *caches)
        return [out, *caches]

    out, _, _ = agrees("attention_prepare", run)
    np.testing.assert_array_equal(out[..., rotated:], q.reshape(20, 4, 24)[..., rotated:])
