"""Latent attention: its preparation, its products by heads and itself, against the reference and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle.codecs import DenseCodec, Quantized, TileCodec
from flashmoe.kernels.kv_cache import cache_shape, load_values, store_values
from flashmoe.kernels.ops import Ops

F = np.float32
Check = Callable[..., Any]
DTYPES = [np.float16, np.float32, np.int8]
# heads, rank, rotated: one lane, two passes of 32 heads and a rest, DeepSeek-V3's own width.
SHAPES = [(1, 16, 4), (67, 40, 8), (4, 512, 64)]


def filled(rng: np.random.Generator, positions: int, width: int, dtype: Any) -> np.ndarray:
    cache = np.zeros(cache_shape(1, positions, width, dtype), dtype)
    store_values(cache, 0, rng.normal(size=(positions, 1, width)).astype(F))
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "rotated"), SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_prepare(
    interleaved: bool,
    heads: int,
    rank: int,
    rotated: int,
    dtype: Any,
    agrees: Check,
    rng: np.random.Generator,
) -> None:
    nope = 12
    angles = rng.normal(size=(60, rotated // 2))
    cos, sin, norm = np.cos(angles).astype(F), np.sin(angles).astype(F), rng.normal(size=rank).astype(F)
    before = filled(rng, 60, rank + rotated, dtype)
    for tokens, position in ((1, 0), (20, 7)):
        q = rng.normal(size=(tokens, heads, nope + rotated)).astype(F)
        latents = rng.normal(size=(tokens, rank + rotated)).astype(F)

        def run(ops: Ops, q: Any = q, latents: Any = latents, at: int = position) -> list[np.ndarray]:
            cache, out = before.copy(), np.full((len(q), heads, rank + rotated), 9, F)
            ops.mla_prepare(q, latents, norm, 1e-6, cos, sin, interleaved, at, out, cache)
            return [out, load_values(cache, rank + rotated)[0]]

        kind = {np.float16: "mla_prepare/f16", np.int8: "mla_prepare/int8"}
        out, rows = agrees(kind.get(dtype, "mla_prepare"), run)
        assert (out[..., :rank] == 9).all()
        others = np.delete(np.arange(len(rows)), slice(position, position + tokens))
        np.testing.assert_array_equal(rows[others], load_values(before, rank + rotated)[0][others])


def test_interleaved_pairs_turn_as_halves_do(same_bits: Check, rng: np.random.Generator) -> None:
    """Scores depend on the pairs alone: both orders give the same products of queries and keys."""
    angles = rng.normal(size=(5, 4))
    cos, sin = np.cos(angles).astype(F), np.sin(angles).astype(F)
    q, latents = rng.normal(size=(5, 2, 8)).astype(F), rng.normal(size=(5, 24)).astype(F)
    latents[:, :16] = 0
    woven = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # halves to pairs

    def run(ops: Ops, order: Any, interleaved: bool) -> list[np.ndarray]:
        cache, out = np.zeros(cache_shape(1, 5, 24, F), F), np.zeros((5, 2, 24), F)
        given = np.concatenate([latents[:, :16], latents[:, 16:][:, order]], 1)
        args = (np.ones(16, F), 1e-6, cos, sin, interleaved, 0, out, cache)
        ops.mla_prepare(np.ascontiguousarray(q[:, :, order]), given, *args)
        return [out, cache]

    halves = same_bits(lambda ops: run(ops, np.arange(8), False))
    pairs = same_bits(lambda ops: run(ops, woven, True))
    for one, other in zip(halves, pairs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rank", "rotated"), SHAPES)
def test_attention(
    heads: int, rank: int, rotated: int, dtype: Any, agrees: Check, rng: np.random.Generator
) -> None:
    for context in (1, 17, 256, 300):
        cache = filled(rng, context + 1, rank + rotated, dtype)
        if dtype != np.int8:
            store_values(cache, context, np.full((1, 1, rank + rotated), np.nan, F))  # beyond the sequence
        for tokens in sorted({1, min(5, context)}):
            q = rng.normal(size=(tokens, heads, rank + rotated)).astype(F)

            def run(ops: Ops, q: Any = q, cache: Any = cache, at: int = context - tokens) -> list[np.ndarray]:
                out = np.full((len(q), heads, rank), np.nan, F)
                ops.mla_attention(q, cache, at, 0.7 / np.sqrt(rank), out)
                return [out]

            agrees("mla_attention", run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_context_in_any_cut_gives_the_same_bits(
    dtype: Any, agrees: Check, same_bits: Check, rng: np.random.Generator
) -> None:
    """One token splits the spans of 2,048 keys over the threads, many tokens are split themselves."""
    heads, rank, width, context, tokens = 34, 16, 20, 4100, 9
    cache = filled(rng, context, width, dtype)
    q = rng.normal(size=(tokens, heads, width)).astype(F)

    def run(ops: Ops, step: int) -> list[np.ndarray]:
        out = np.full((tokens, heads, rank), np.nan, F)
        for t in range(0, tokens, step):
            part = slice(t, t + step)
            ops.mla_attention(q[part], cache, context - tokens + t, 0.3, out[part])
        return [out]

    whole = agrees("mla_attention", lambda ops: run(ops, tokens))
    for step in (1, 4):
        np.testing.assert_array_equal(whole[0], same_bits(lambda ops, step=step: run(ops, step))[0])


def test_attention_of_no_tokens(same_bits: Check) -> None:
    def run(ops: Ops) -> list[np.ndarray]:
        cache, none = np.ones(cache_shape(1, 8, 16, F), F), np.empty((0, 2, 16), F)
        angles = np.ones((8, 2), F)
        ops.mla_prepare(
            none, np.empty((0, 16), F), np.ones(12, F), 1e-6, angles, angles, True, 3, none, cache
        )
        ops.mla_attention(none, cache, 3, 1.0, np.empty((0, 2, 12), F))
        return [cache]

    assert (same_bits(run)[0] == 1).all()


def halves(values: np.ndarray) -> np.ndarray:
    raw: np.ndarray = (values.astype(F).view(np.uint32) >> 16).astype(np.uint16)
    return raw


@pytest.mark.parametrize("path", ["int8", "f32"])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("codec", [TileCodec(4, 32), TileCodec(8, 64), DenseCodec("f32"), DenseCodec("bf16")])
def test_a_product_for_each_head(
    codec: Any, precise: bool, path: str, agrees: Check, same_bits: Check, rng: np.random.Generator
) -> None:
    heads, rows, cols, tokens = 3, 32, 128, 70
    if isinstance(codec, TileCodec):
        groups = (heads * rows, cols // codec.group)
        scales, biases = rng.uniform(0.5, 2, groups) / 200, rng.uniform(-0.1, 0.05, groups)
        codes = rng.integers(0, 1 << codec.bits, (heads * rows, cols), np.uint8)
        data = codec.pack(*Quantized(codes, halves(scales), halves(biases)))
    else:
        values = rng.normal(size=(heads * rows, cols)) / 10
        data = (halves(values) if codec.dtype == "bf16" else values.astype(F)).view(np.uint8)
    x = rng.normal(size=(tokens, heads, cols + 7)).astype(F)
    x[2, 1, 5] = 15  # an outlier: its group gets a low plane
    bias = rng.normal(size=heads * rows).astype(F)

    def run(ops: Ops, step: int = tokens) -> list[np.ndarray]:
        weight, out = (
            ops.weight(data, codec, heads * rows, cols, bias),
            np.full((tokens, heads, rows + 3), 9, F),
        )
        for t in range(0, tokens, step):
            ops.head_linear(x[t : t + step], weight, out[t : t + step], precise)
        return [out]

    (out,) = agrees("head_linear", run, path)
    assert (out[..., rows:] == 9).all()
    np.testing.assert_array_equal(out, same_bits(lambda ops: run(ops, 1), path)[0])
