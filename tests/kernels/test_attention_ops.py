"""Attention and its preparation: against the reference, and in pieces, over float16 and float32 caches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.kv_cache import cache_shape, load_keys, load_values, store_keys, store_values
from flashmoe.kernels.ops import Ops
from flashmoe.nn.rotary import Rope, RotaryTable

F = np.float32
EPS = 1e-6
Check = Callable[..., Any]


class Shape(NamedTuple):
    """heads, key/value heads, head dimension, rotated dimensions."""

    heads: int
    kv_heads: int
    dim: int
    rotated: int


# One head; all rotated; ten query heads a key (two tasks); head dimensions that end within a vector; the demo's own.
SHAPES = [
    Shape(1, 1, 8, 0),
    Shape(3, 3, 10, 10),
    Shape(20, 2, 24, 6),
    Shape(4, 1, 72, 18),
    Shape(9, 3, 64, 16),
]
CONTEXTS = (1, 15, 16, 65, 256, 257, 600)  # the cache lies in blocks of 16, keys are taken in blocks of 256
DTYPES = [np.float16, np.float32, np.int8]
Caches = tuple[np.ndarray, np.ndarray]


class Layer(NamedTuple):
    """What a call of attention reads, for `tokens` tokens."""

    q_gate: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray

    def part(self, begin: int, end: int) -> Layer:
        return self._replace(q_gate=self.q_gate[begin:end], k=self.k[begin:end], v=self.v[begin:end])


def layer(rng: np.random.Generator, shape: Shape, tokens: int) -> Layer:
    widths = (2 * shape.heads * shape.dim, shape.kv_heads * shape.dim, shape.kv_heads * shape.dim)
    q_gate, k, v = (rng.normal(size=(tokens, width)).astype(F) for width in widths)
    q_norm, k_norm = rng.normal(size=(2, shape.dim)).astype(F)
    return Layer(q_gate, k, v, q_norm, k_norm)


def random_plain(rng: np.random.Generator, shape: Shape, context: int) -> Caches:
    keys, values = rng.normal(size=(2, context, shape.kv_heads, shape.dim)).astype(F)
    return keys, values


def packed(keys: np.ndarray, values: np.ndarray, dtype: Any) -> Caches:
    """Caches of exactly these keys and values [positions, kv_heads, dim]."""
    positions, kv_heads, dim = keys.shape
    size = cache_shape(kv_heads, positions, dim, dtype)
    caches = np.zeros(size, dtype), np.zeros(size, dtype)
    store_keys(caches[0], 0, keys)
    store_values(caches[1], 0, values)
    return caches


def unpacked(caches: Caches, shape: Shape) -> Caches:
    """Keys and values [positions, kv_heads, dim] as they count."""
    keys, values = load_keys(caches[0], shape.dim), load_values(caches[1], shape.dim)
    return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def filled(rng: np.random.Generator, shape: Shape, context: int, dtype: Any) -> Caches:
    return packed(*random_plain(rng, shape, context), dtype)


def prepare(ops: Ops, shape: Shape, given: Layer, caches: Caches, position: int) -> np.ndarray:
    table = RotaryTable(16 * caches[0].shape[1], Rope(shape.rotated, 10_000.0))
    q = np.full((len(given.k), shape.heads, shape.dim), np.nan, F)
    ops.attention_prepare(*given, EPS, table.cos, table.sin, position, q, *caches)
    return q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("tokens", "position"), [(1, 0), (2, 0), (7, 61), (65, 3)])
def test_prepare(
    tokens: int, position: int, shape: Shape, dtype: Any, agrees: Check, rng: np.random.Generator
) -> None:
    given = layer(rng, shape, tokens)
    given.k[0] = 0
    given.k[-1] *= F(1e-6)
    before = filled(rng, shape, 70, dtype)

    def run(ops: Ops) -> list[np.ndarray]:
        caches = before[0].copy(), before[1].copy()
        return [prepare(ops, shape, given, caches, position), *unpacked(caches, shape)]

    op = {np.float32: "attention_prepare", np.float16: "attention_prepare/f16"}
    _, keys, values = agrees(op.get(dtype, "attention_prepare/int8"), run)
    new = slice(position, position + tokens)
    v = given.v.reshape(tokens, shape.kv_heads, shape.dim)
    # Values pass untouched: whatever the type, they are stored to the bit as the reference does.
    np.testing.assert_array_equal(values[new], unpacked(packed(v, v, dtype), shape)[1][:tokens])
    for cache, old in zip((keys, values), unpacked(before, shape), strict=True):
        np.testing.assert_array_equal(np.delete(cache, new, axis=0), np.delete(old, new, axis=0))


@pytest.mark.parametrize("dim", [8, 64, 72, 160])
def test_int8_codes_are_at_most_half_a_step_off(dim: int, same_bits: Check, rng: np.random.Generator) -> None:
    """A step is 1/127 of the largest of 64 values: an outlier coarsens its own group only."""
    shape, tokens = Shape(1, 1, dim, 0), 40
    given = layer(rng, shape, tokens)
    given.v[3, 0], given.v[4] = 1000, 0

    def run(ops: Ops) -> list[np.ndarray]:
        caches = packed(*random_plain(rng, shape, tokens), np.int8)
        prepare(ops, shape, given, caches, 0)
        return [unpacked(caches, shape)[1]]

    (values,) = same_bits(run)
    for begin in range(0, dim, 64):
        v = given.v[:, begin : begin + 64]
        step = np.abs(v).max(1, keepdims=True) / 127
        assert (np.abs(values[:tokens, 0, begin : begin + 64] - v) <= 0.5001 * step).all()


def test_int8_keeps_what_is_not_finite(backends: list[CpuOps], rng: np.random.Generator) -> None:
    shape = Shape(1, 1, 128, 0)
    given = layer(rng, shape, 2)
    given.v[0, 3], given.v[1, 127] = np.nan, np.inf
    for ops in backends:
        caches = filled(rng, shape, 2, np.int8)
        prepare(ops, shape, given, caches, 0)
        values = unpacked(caches, shape)[1]
        spoilt = np.zeros((2, 128), bool)
        spoilt[0, :64], spoilt[1, 64:] = True, True
        np.testing.assert_array_equal(np.isnan(values[:2, 0]), spoilt)


def test_cached_halves_are_rounded_as_numpy_does(same_bits: Check) -> None:
    """Ties to even, subnormals, the step to infinity: in every instruction set, where scalar has code of its own."""
    shape = Shape(1, 1, 16, 0)
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 1.5 * 2**-24]
    ends = [65504, 65519.99, 65520, -7e4, 2**-14, 2**-15, 2**-24, -3e-8, 1e-10]
    v = np.array([[0.0, -0.0, np.nan, *ties, *ends]], F)
    given = Layer(np.zeros((1, 32), F), np.zeros((1, 16), F), v, np.ones(16, F), np.ones(16, F))

    def run(ops: Ops) -> list[np.ndarray]:
        caches = filled(np.random.default_rng(1), shape, 1, np.float16)
        prepare(ops, shape, given, caches, 0)
        return [caches[1][0, 0, :16].view(np.uint16)]

    (stored,) = same_bits(run)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(stored.view(np.float16), v[0].astype(np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_attention(context: int, shape: Shape, dtype: Any, agrees: Check, rng: np.random.Generator) -> None:
    keys, values = random_plain(rng, shape, context + 1)
    # Beyond the sequence: must not count.
    keys[context], values[context] = (1e30, 1e30) if dtype == np.int8 else (np.nan, np.nan)
    keys, values = packed(keys, values, dtype)
    for tokens in sorted({1, min(2, context), min(7, context)}):
        q = rng.normal(size=(tokens, shape.heads, shape.dim)).astype(F)
        q_gate = rng.normal(size=(tokens, 2 * q[0].size)).astype(F)

        def run(ops: Ops, q: np.ndarray = q, q_gate: np.ndarray = q_gate) -> list[np.ndarray]:
            out = np.full((len(q), q[0].size), np.nan, F)
            ops.attention(q, keys, values, context - len(q), q_gate, out)
            return [out]

        agrees("attention", run)


def test_attention_of_a_long_chunk(agrees: Check, rng: np.random.Generator) -> None:
    shape = SHAPES[2]
    keys, values = filled(rng, shape, 65, np.float16)
    q = rng.normal(size=(65, shape.heads, shape.dim)).astype(F)
    q_gate = rng.normal(size=(65, 2 * q[0].size)).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full((65, q[0].size), np.nan, F)
        ops.attention(q, keys, values, 0, q_gate, out)
        return [out]

    agrees("attention", run)


@pytest.mark.parametrize("largest", [0.0, 80.0, -80.0, 3e4])
def test_attention_of_extreme_scores(largest: float, agrees: Check, rng: np.random.Generator) -> None:
    """Scores of zero, of +-80 and far beyond what exp can take; gates shut and open."""
    shape, context = Shape(2, 1, 16, 0), 130
    q = np.zeros((1, 2, 16), F)
    q[:, :, 0] = 4.0  # sqrt(16): the score is the key's first value
    plain, values = random_plain(rng, shape, context)
    plain[:, 0, 0] = np.linspace(-largest, largest, context, dtype=F)
    caches = packed(plain, values, F)
    q_gate = np.concatenate([q, np.full((1, 2, 16), 80, F)], axis=2)
    q_gate[0, 1, 16:] = -80

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full((1, 32), np.nan, F)
        ops.attention(q, *caches, context - 1, q_gate, out)
        return [out]

    (out,) = agrees("attention", run)
    assert np.abs(out[0, 16:]).max() < 1e-33
    if largest == 0:
        np.testing.assert_allclose(out[0, :16], values[:, 0].mean(0), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_a_sequence_in_pieces_gives_the_same_bits(
    shape: Shape, dtype: Any, same_bits: Check, rng: np.random.Generator
) -> None:
    given, tokens = layer(rng, shape, 300), 300

    def run(ops: Ops, cuts: list[int]) -> list[np.ndarray]:
        size = cache_shape(shape.kv_heads, tokens, shape.dim, dtype)
        caches = np.zeros(size, dtype), np.zeros(size, dtype)
        out = np.full((tokens, shape.heads * shape.dim), np.nan, F)
        for begin, end in pairwise(cuts):
            part = given.part(begin, end)
            q = prepare(ops, shape, part, caches, begin)
            ops.attention(q, *caches, begin, part.q_gate, out[begin:end])
        return [out, *caches]

    whole = same_bits(lambda ops: run(ops, [0, tokens]))
    for cuts in ([0, 1, 8, 63, 255, 257, tokens], list(range(tokens + 1))):
        for one, other in zip(whole, same_bits(lambda ops, cuts=cuts: run(ops, cuts)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_query_that_is_not_a_number_spoils_its_own_head_only(backends: list[CpuOps]) -> None:
    q = np.ones((1, 2, 8), F)
    q[0, 1, 5] = np.nan
    caches = packed(np.ones((3, 1, 8), F), np.ones((3, 1, 8), F), F)
    for ops in backends:
        out = np.zeros((1, 16), F)
        ops.attention(q, *caches, 2, np.zeros((1, 32), F), out)
        assert np.isnan(out[0, 8:]).all()
        np.testing.assert_allclose(out[0, :8], 0.5, rtol=1e-6)


def test_attention_of_no_tokens(backends: list[CpuOps]) -> None:
    shape = Shape(2, 1, 8, 4)
    for ops in backends:
        caches = np.ones((1, 1, 256), F), np.ones((1, 1, 256), F)
        none = Layer(np.empty((0, 32), F), np.empty((0, 8), F), np.empty((0, 8), F), *np.ones((2, 8), F))
        q = prepare(ops, shape, none, caches, 3)
        ops.attention(q, *caches, 3, none.q_gate, np.empty((0, 16), F))
        assert (caches[0] == 1).all()


def test_a_long_context_in_any_cut_gives_the_same_bits(same_bits: Check, rng: np.random.Generator) -> None:
    """One token splits the keys over the threads, many tokens are split themselves."""
    shape, context, tokens = Shape(9, 3, 32, 0), 1300, 40
    caches = filled(rng, shape, context, np.float16)
    q = rng.normal(size=(tokens, shape.heads, shape.dim)).astype(F)
    q_gate = rng.normal(size=(tokens, 2 * q[0].size)).astype(F)

    def run(ops: Ops, step: int) -> list[np.ndarray]:
        out = np.full((tokens, q[0].size), np.nan, F)
        for t in range(0, tokens, step):
            part = slice(t, t + step)
            ops.attention(q[part], *caches, context - tokens + t, q_gate[part], out[part])
        return [out]

    whole = same_bits(lambda ops: run(ops, tokens))
    for step in (1, 3):
        np.testing.assert_array_equal(whole[0], same_bits(lambda ops, step=step: run(ops, step))[0])
