"""Codes that stand for table entries, biases of products, and the clamped GLU of gpt-oss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle.codecs import (
    FP4_TABLE,
    ClampedGlu,
    DenseCodec,
    FfnBiases,
    FfnLayout,
    Quantized,
    TileCodec,
    pack_ffn,
)
from flashmoe.kernels.ops import Ops

F = np.float32
Check = Callable[..., Any]
PATHS = ("int8", "f32")
BOUND = {"int8": "expert_ffn/int8", "f32": "expert_ffn"}
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # OCP MX specification, E2M1
HIGH = tuple(range(127, 127 - 16 * 8, -8))  # up to the largest entry


def fp4(rng: np.random.Generator, rows: int, cols: int) -> Quantized:
    """Random FP4 codes with a power of two for 32 of them, about 1 / sqrt(cols) large."""
    powers = np.exp2(rng.integers(-2, 2, (rows, cols // 32)) - np.round(np.log2(cols) / 2)).astype(F) / 4
    raw = [(values.astype(F).view(np.uint32) >> 16).astype(np.uint16) for values in (powers, -12 * powers)]
    return Quantized(rng.integers(0, 16, (rows, cols), np.uint8), raw[0], raw[1])


def test_fp4_is_exact(same_bits: Check, rng: np.random.Generator) -> None:
    """Every value of every power of two that stays finite, to the bit; embed shows what a matrix holds."""
    codec, exponents = TileCodec(4, 32, "bf16", FP4_TABLE), np.arange(0, 252)
    halves = np.exp2(exponents - 128.0).astype(F)  # 2^(e - 127) / 2
    scales = (halves.view(np.uint32) >> 16).astype(np.uint16)[:, None]
    biases = ((F(-12) * halves).view(np.uint32) >> 16).astype(np.uint16)[:, None]
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(exponents), 2))
    tiles = codec.pack(codes, scales, biases)
    wanted = (np.array(FP4)[codes] * np.exp2(exponents - 127.0)[:, None]).astype(F)

    def run(ops: Ops) -> list[np.ndarray]:
        out = np.full(wanted.shape, np.nan, F)
        ops.embed(ops.weight(tiles, codec, *wanted.shape), np.arange(len(wanted), dtype=np.int32), out)
        return [out]

    np.testing.assert_array_equal(same_bits(run)[0], wanted)
    np.testing.assert_array_equal(codec.dequantize(tiles, *wanted.shape), wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("codec", [TileCodec(4, g, "bf16", t) for g in (32, 64) for t in (FP4_TABLE, HIGH)])
def test_linear_with_tables_and_biases(
    codec: TileCodec, precise: bool, path: str, agrees: Check, same_bits: Check, rng: np.random.Generator
) -> None:
    for rows, groups, tokens in ((1, 1, 1), (17, 3, 2), (31, 2, 70)):
        cols = groups * codec.group
        given = fp4(rng, rows, 32 * groups)
        codes = rng.integers(0, 16, (rows, cols), np.uint8)
        tiles = codec.pack(codes, given.scales, given.biases)
        x = rng.normal(size=(tokens, cols)).astype(F) / 8
        x[0, cols // 2] = 2
        bias, dense = rng.normal(size=rows).astype(F), rng.normal(size=(3, cols)).astype(F)

        def run(
            ops: Ops, size: int, x: Any = x, tiles: Any = tiles, bias: Any = bias, dense: Any = dense
        ) -> list[np.ndarray]:
            matrix = ops.weight(tiles, codec, len(bias), x.shape[1], bias)
            floats = ops.weight(dense.view(np.uint8), DenseCodec("f32"), 3, x.shape[1], bias[:1].repeat(3))
            outs = [np.full((len(x), n), np.nan, F) for n in (len(bias), 3)]
            for t in range(0, len(x), size):
                part = slice(t, t + size)
                ops.linear(x[part], [matrix, floats], [out[part] for out in outs], precise)
            return outs

        outs = agrees("linear", lambda ops, n=tokens: run(ops, n), path)
        for one, other in zip(outs, same_bits(lambda ops: run(ops, 1), path), strict=True):
            np.testing.assert_array_equal(one, other)


LAYOUTS = [
    FfnLayout(64, 40, TileCodec(4, 32, "bf16", FP4_TABLE), TileCodec(4, 32, "bf16", FP4_TABLE), glu, biased)
    for glu in (None, ClampedGlu(1.702, 0.5), ClampedGlu(1.702, 7.0))
    for biased in (False, True)
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_experts(
    layout: FfnLayout, path: str, agrees: Check, same_bits: Check, rng: np.random.Generator
) -> None:
    def record() -> np.ndarray:
        parts = [fp4(rng, 40, 64), fp4(rng, 40, 64), fp4(rng, 64, 64)]
        biases = FfnBiases(*(rng.normal(scale=0.3, size=n).astype(F) for n in (40, 40, 64)))
        return pack_ffn(layout, *parts, biases if layout.biased else None)

    records, x = [record(), record()], (rng.normal(size=(70, 64)) / 2).astype(F)
    weights = rng.random(140).astype(F)

    def run(ops: Ops, size: int) -> list[np.ndarray]:
        held = [ops.ffn_weights(data, layout) for data in records]
        apart, summed = np.full((140, 64), np.nan, F), np.ones((70, 64), F)
        for t in range(0, 70, size):
            source, part = ops.token_input(), x[t : t + size]
            ops.prepare(source, part, 32)
            tokens = np.tile(np.arange(size, dtype=np.int32), 2)
            where = np.concatenate([tokens[:size] + t, tokens[:size] + t + 70])
            call = (held[0].layout, [one.address for one in held], [0, size, 2 * size], tokens)
            ops.expert_ffn(source, *call, where.astype(np.int32), apart)
            factors = np.concatenate([weights[t : t + size], weights[70 + t : 70 + t + size]])
            ops.expert_ffn(source, *call, np.tile(np.arange(t, t + size, dtype=np.int32), 2), summed, factors)
        return [apart, summed]

    outs = agrees(BOUND[path], lambda ops: run(ops, 70), path, "expert_ffn")
    assert np.abs(outs[0]).max() > 0.1
    for one, other in zip(outs, same_bits(lambda ops: run(ops, 1), path), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_a_number_stays_so_in_a_clamped_glu(
    path: str, same_bits: Check, rng: np.random.Generator
) -> None:
    layout = LAYOUTS[-1]
    parts = [fp4(rng, 40, 64), fp4(rng, 40, 64), fp4(rng, 64, 64)]
    data = pack_ffn(layout, *parts, FfnBiases(*(np.zeros(n, F) for n in (40, 40, 64))))
    x = np.ones((2, 64), F)
    x[1, 3] = np.nan

    def run(ops: Ops) -> list[np.ndarray]:
        held, source, out = ops.ffn_weights(data, layout), ops.token_input(), np.zeros((2, 64), F)
        ops.prepare(source, x, 32)
        rows = np.arange(2, dtype=np.int32)
        ops.expert_ffn(source, held.layout, [held.address], [0, 2], rows, rows, out)
        return [out]

    (out,) = same_bits(run, path)
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
