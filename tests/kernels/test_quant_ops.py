"""Quantised kernels against float64 numpy on odd shapes, on every instruction set this machine has."""

from __future__ import annotations

import numpy as np
import pytest

from flashmoe import _native
from flashmoe.bundle.codecs import FfnLayout, Quantized, TileCodec, pack_ffn
from flashmoe.kernels.cpu import CpuOps

ISAS = _native.supported_isas()
CODECS = [TileCodec(b, g, s) for b in (2, 3, 4, 6, 8) for g in (32, 64) for s in ("bf16", "f16")]


def random_matrix(codec: TileCodec, rows: int, cols: int, seed: int) -> Quantized:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << codec.bits, (rows, cols), dtype=np.uint8)
    values = rng.normal(0, 0.1, (2, rows, cols // codec.group)).astype(np.float32)
    if codec.scale_dtype == "f16":
        raw = values.astype(np.float16).view(np.uint16)
    else:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    return Quantized(codes, raw[0], raw[1])


LIMIT, LIMIT_GATED = 3.25, 4.5  # kCoarseLimit, kCoarseLimitGated
F = np.float32


def quantized(x: np.ndarray, group: int, limit: float = LIMIT) -> np.ndarray:
    """What the int8 path sees instead of x (float64), from the definition in quant_kernels.h; limit 0: precise."""
    parts = x.reshape(x.shape[0], -1, group)
    amax = np.abs(parts).max(-1, keepdims=True)
    scaled = parts * np.where(amax > 1e-34, F(127) / np.where(amax > 0, amax, 1), 0).astype(F)
    high = np.rint(scaled)
    low = np.rint((scaled - high) * F(128))
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1))[:, None, None]
    fine = amax > limit * rms
    scale = (amax / F(127)).astype(np.float64)
    return ((high + np.where(fine, low / 128.0, 0)) * scale).reshape(x.shape)


def expected_linear(
    codec: TileCodec, matrix: Quantized, x: np.ndarray, activations: str, limit: float = LIMIT
) -> np.ndarray:
    """float64 product with the dequantised weights."""
    seen = quantized(x, codec.group, limit) if activations == "int8" else x.astype(np.float64)
    return seen @ codec.values(matrix).astype(np.float64).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_linear_matches_float64(codec: TileCodec, activations: str, isa: str) -> None:
    ops = CpuOps(2, activations, isa)
    for rows, cols, tokens in ((5, 64, 1), (33, 192, 3), (16, 128, 37)):
        matrix = random_matrix(codec, rows, cols, rows)
        x = np.random.default_rng(7).normal(size=(tokens, cols)).astype(np.float32)
        x[tokens // 2, 1] = 20  # a group with a low plane
        x[0, :64] = 0  # a group of zeros must not divide by zero
        out = np.full((tokens, rows), np.nan, np.float32)
        ops.linear(x, [ops.weight(codec.pack(*matrix), codec, rows, cols)], [out])
        want = expected_linear(codec, matrix, x, activations)
        # float32 sums of `cols` products of size |w||x|: error bound cols * 2^-23 * largest partial sum.
        bound = 1e-6 * np.sqrt(cols) * (1 << codec.bits)
        assert np.abs(out - want).max() <= bound


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_isa_thread_count_and_split_gives_the_same_bits(codec: TileCodec, activations: str) -> None:
    rows, cols, tokens = 67, 256, 37
    matrix = random_matrix(codec, rows, cols, 1)
    tiles = codec.pack(*matrix)
    x = np.random.default_rng(2).normal(size=(tokens, cols)).astype(np.float32)
    x[::3, 70] = 9  # some groups get a low plane
    results = []
    for isa in ISAS:
        for threads in (1, 2, 3):
            ops = CpuOps(threads, activations, isa)
            weight = ops.weight(tiles, codec, rows, cols)
            out = np.empty((tokens, rows), np.float32)
            ops.linear(x, [weight], [out])
            results.append(out)
            split = np.empty_like(out)
            for begin, end in ((0, 1), (1, 18), (18, 37)):
                part = np.empty((end - begin, rows), np.float32)
                ops.linear(np.ascontiguousarray(x[begin:end]), [weight], [part])
                split[begin:end] = part
            results.append(split)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("isa", ISAS)
def test_linear_takes_several_matrices_of_different_codecs(isa: str) -> None:
    ops = CpuOps(2, "int8", isa)
    x = np.random.default_rng(3).normal(size=(4, 128)).astype(np.float32)
    codecs = [TileCodec(4, 64), TileCodec(8, 32, "f16"), TileCodec(2, 64)]
    weights, outs, wants = [], [], []
    for i, codec in enumerate(codecs):
        matrix = random_matrix(codec, 17 + i, 128, i)
        weights.append(ops.weight(codec.pack(*matrix), codec, 17 + i, 128))
        outs.append(np.empty((4, 17 + i), np.float32))
        wants.append(expected_linear(codec, matrix, x, "int8"))
    ops.linear(x, weights, outs)
    for out, want in zip(outs, wants, strict=True):
        np.testing.assert_allclose(out, want, atol=3e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_linear_matches_float64(dtype: str, isa: str) -> None:
    from flashmoe.bundle.codecs import DenseCodec

    rng = np.random.default_rng(5)
    w = rng.normal(size=(9, 77)).astype(np.float32)
    stored = {"f32": w, "f16": w.astype(np.float16), "bf16": (w.view(np.uint32) >> 16).astype(np.uint16)}[
        dtype
    ]
    exact = (
        (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else stored.astype(np.float32)
    )
    x = rng.normal(size=(5, 77)).astype(np.float32)
    out = np.empty((5, 9), np.float32)
    ops = CpuOps(2, "int8", isa)
    ops.linear(x, [ops.weight(stored.view(np.uint8), DenseCodec(dtype), 9, 77)], [out])
    np.testing.assert_allclose(out, x.astype(np.float64) @ exact.T.astype(np.float64), atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_embed_is_the_dequantised_row_bit_for_bit(codec: TileCodec, isa: str) -> None:
    matrix = random_matrix(codec, 35, 128, 4)
    ops = CpuOps(1, "int8", isa)
    ids = np.array([0, 34, 17, 17, 16], np.int32)
    out = np.empty((5, 128), np.float32)
    ops.embed(ops.weight(codec.pack(*matrix), codec, 35, 128), ids, out)
    np.testing.assert_array_equal(out, codec.values(matrix)[ids])


def ffn_reference(
    parts: list[tuple[TileCodec, Quantized]], x: np.ndarray, activations: str, padded: int, precise: bool
) -> np.ndarray:
    limits = (0.0, 0.0) if precise else (LIMIT, LIMIT_GATED)
    gate, up = (expected_linear(codec, matrix, x, activations, limits[0]) for codec, matrix in parts[:2])
    hidden = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    hidden = np.pad(hidden, ((0, 0), (0, padded - hidden.shape[1])))
    return expected_linear(*parts[2], hidden, activations, limits[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(("gate_up", "down"), [(4, 4), (2, 3), (3, 8), (8, 2)])
def test_expert_ffn_matches_float64(
    gate_up: int, down: int, precise: bool, activations: str, isa: str
) -> None:
    hidden, intermediate, tokens = 128, 80, 6  # 80 columns of down are padded to 128
    layout = FfnLayout(hidden, intermediate, TileCodec(gate_up, 64), TileCodec(down, 64))
    ops = CpuOps(2, activations, isa)
    x = np.random.default_rng(8).normal(size=(tokens, hidden)).astype(np.float32)
    parts = [
        (layout.gate_up, random_matrix(layout.gate_up, intermediate, hidden, 1)),
        (layout.gate_up, random_matrix(layout.gate_up, intermediate, hidden, 2)),
        (layout.down, random_matrix(layout.down, hidden, layout.intermediate_padded, 3)),
    ]
    record = pack_ffn(layout, *(matrix for _, matrix in parts))
    weights = ops.ffn_weights(record, layout)
    source = ops.token_input()
    ops.prepare(source, x, 64)
    out = np.empty((tokens, hidden), np.float32)
    rows = np.arange(tokens, dtype=np.int32)
    addresses, offsets, shared = [weights.address], [0, tokens], None
    if precise:  # as the block of every token
        addresses, offsets, shared = [], [tokens], (source, weights.layout, weights.address)
    ops.expert_ffn(source, weights.layout, addresses, offsets, rows, rows[::-1].copy(), out, None, shared)
    want = ffn_reference(parts, x, activations, layout.intermediate_padded, precise)
    # Rounding of the hidden values to int8 may flip by one code between float32 and float64.
    tolerance = (0.02 if activations == "int8" else 2e-5) * np.abs(want).max()
    assert np.abs(out[::-1] - want).max() <= tolerance


@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_accumulated_experts_equal_combined_ones_bit_for_bit(activations: str) -> None:
    """Prefill adds expert by expert, decode keeps results apart and combines: the sums must be the same bits."""
    layout = FfnLayout(64, 64, TileCodec(4, 64), TileCodec(4, 64))
    x = np.random.default_rng(9).normal(size=(3, 64)).astype(np.float32)
    factors = np.random.default_rng(10).random((3, 2)).astype(np.float32)
    reference = None
    for isa in ISAS:
        for threads in (1, 2):
            ops = CpuOps(threads, activations, isa)
            records = []
            for e in range(2):
                matrices = [random_matrix(TileCodec(4, 64), 64, 64, 10 * e + i) for i in range(3)]
                records.append(pack_ffn(layout, *matrices))
            native = ops.ffn_layout(layout)
            addresses = [record.ctypes.data for record in records]
            source = ops.token_input()
            ops.prepare(source, x, 64)
            tokens = np.array([0, 1, 2, 0, 1, 2], np.int32)
            summed = np.zeros((3, 64), np.float32)
            flat = np.ascontiguousarray(factors.T).ravel()
            ops.expert_ffn(source, native, addresses, [0, 3, 6], tokens, tokens, summed, flat)
            apart = np.empty((6, 64), np.float32)
            ops.expert_ffn(source, native, addresses, [0, 3, 6], tokens, np.arange(6, dtype=np.int32), apart)
            combined = np.zeros((3, 64), np.float32)
            ops.combine(apart, tokens, flat, combined)
            np.testing.assert_array_equal(summed, combined)
            reference = summed if reference is None else reference
            np.testing.assert_array_equal(summed, reference)


def test_wrong_arguments_are_refused_by_name() -> None:
    ops = CpuOps(1)
    codec = TileCodec(4, 64)
    weight = ops.weight(codec.pack(*random_matrix(codec, 16, 64, 0)), codec, 16, 64)
    with pytest.raises(ValueError, match="columns"):
        ops.linear(np.zeros((1, 128), np.float32), [weight], [np.zeros((1, 16), np.float32)])
    with pytest.raises(ValueError, match="out has the wrong size"):
        ops.linear(np.zeros((1, 64), np.float32), [weight], [np.zeros((1, 15), np.float32)])
    with pytest.raises(ValueError, match="outside the table"):
        ops.embed(weight, np.array([16], np.int32), np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="tiles' size"):
        ops.weight(np.zeros(10, np.uint8), codec, 16, 64)
