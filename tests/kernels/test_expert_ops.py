"""Products and feed-forward records against the reference: all codecs, several experts, padding, extreme inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.kernels.conftest import native_backends

from flashmoe.bundle.codecs import DenseCodec, FfnLayout, Quantized, TileCodec, pack_ffn
from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import Ops
from flashmoe.kernels.reference_quant import SURE_TILES

F = np.float32
Check = Callable[..., Any]
BOUND = {"int8": "expert_ffn/int8", "f32": "expert_ffn"}
PATHS = tuple(BOUND)
BITS = (2, 3, 4, 6, 8)


def matrix(rng: np.random.Generator, codec: TileCodec, rows: int, cols: int) -> Quantized:
    """Codes, scales and biases that take values of the order of one to such values."""
    groups = (rows, cols // codec.group)
    values = np.stack([rng.uniform(0.5, 2, groups) / (1 << codec.bits), rng.uniform(-1, 0.5, groups)])
    values = (values / np.sqrt(cols)).astype(F)
    if codec.scale_dtype == "f16":
        raw = values.astype(np.float16).view(np.uint16)
    else:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    return Quantized(rng.integers(0, 1 << codec.bits, (rows, cols), np.uint8), raw[0], raw[1])


def activations_of(rng: np.random.Generator, tokens: int, cols: int) -> np.ndarray:
    """Normal rows, one with an outlier (its group gets a low plane), then rows of zeros, tiny and large values."""
    x = rng.normal(size=(tokens, cols)).astype(F)
    x[0, cols // 2] = 12
    for row, factor in zip(range(1, tokens), (0.0, 1e-6, 1e-36, 5.0), strict=False):
        x[row] *= F(factor)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("planes", [{}, {"precise": True}, {"gated": True}], ids=str)
@pytest.mark.parametrize("codec", [TileCodec(b, g, "f16") for b in BITS for g in (32, 64)], ids=str)
def test_linear(
    codec: TileCodec, planes: dict[str, bool], path: str, agrees: Check, rng: np.random.Generator
) -> None:
    for rows, groups, tokens in ((1, 1, 1), (15, 3, 2), (17, 1, 7), (31, 2, 66)):  # 64 tokens are one block
        cols = groups * codec.group
        tiles = codec.pack(*matrix(rng, codec, rows, cols))
        x = activations_of(rng, tokens, cols)

        def run(ops: Ops, shape: Any = (rows, cols), x: Any = x, tiles: Any = tiles) -> list[np.ndarray]:
            out = np.full((len(x), shape[0]), np.nan, F)
            ops.linear(x, [ops.weight(tiles, codec, *shape)], [out], **planes)
            return [out]

        (out,) = agrees("linear", run, path)
        assert tokens < 2 or not out[1].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("codec", [TileCodec(4, 64, "bf16"), TileCodec(8, 32, "f16")], ids=str)
def test_logits(codec: TileCodec, path: str, agrees: Check, rng: np.random.Generator) -> None:
    """Fewer tiles than are computed twice, one more, a part of one more, and many; token 1 is zero: all are equal."""
    for rows, groups, tokens in ((9, 1, 1), (1040, 1, 2), (1041, 2, 3), (4099, 2, 9)):
        cols = groups * codec.group
        tiles = codec.pack(*matrix(rng, codec, rows, cols))
        x = activations_of(rng, tokens, cols)

        def run(ops: Ops, shape: Any = (rows, cols), x: Any = x, tiles: Any = tiles) -> list[np.ndarray]:
            weight = ops.weight(tiles, codec, *shape)
            out, alone = np.full((2, len(x), shape[0]), np.nan, F)
            ops.logits(x, weight, out)
            for t in range(len(x)):
                ops.logits(x[t : t + 1], weight, alone[t : t + 1])
            np.testing.assert_array_equal(out, alone, "its neighbours change a token's logits")
            return [out]

        agrees("logits", run, path)


def test_likely_logits_are_precise_and_others_are_not(rng: np.random.Generator) -> None:
    codec, rows, cols = TileCodec(4, 64, "bf16"), 4096, 256
    tiles, x = codec.pack(*matrix(rng, codec, rows, cols)), rng.normal(size=(3, cols)).astype(F)
    ops = CpuOps(2)
    weight = ops.weight(tiles, codec, rows, cols)
    mixed, coarse, precise = np.empty((3, 3, rows), F)
    ops.logits(x, weight, mixed)
    ops.linear(x, [weight], [coarse])
    ops.linear(x, [weight], [precise], precise=True)
    for t in range(3):
        likely = np.argsort(-coarse[t].reshape(-1, 16).max(-1), kind="stable")[:SURE_TILES]
        sure = np.isin(np.arange(rows) // 16, likely)
        np.testing.assert_array_equal(mixed[t], np.where(sure, precise[t], coarse[t]))
        assert (mixed[t][~sure] != precise[t][~sure]).mean() > 0.9


def test_a_broken_token_has_no_likely_logits(rng: np.random.Generator) -> None:
    codec, x = TileCodec(4, 64, "bf16"), rng.normal(size=(2, 64)).astype(F)
    x[0, 3] = np.nan
    tiles = codec.pack(*matrix(rng, codec, 2048, 64))
    for ops in native_backends("int8"):
        weight, out, sound = (
            ops.weight(tiles, codec, 2048, 64),
            np.zeros((2, 2048), F),
            np.zeros((1, 2048), F),
        )
        ops.logits(x, weight, out)
        ops.logits(x[1:], weight, sound)
        assert np.isnan(out[0]).all()
        np.testing.assert_array_equal(out[1:], sound)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_matrices(dtype: str, agrees: Check, rng: np.random.Generator) -> None:
    """Odd widths and widths of several tasks; embed copies rows exactly."""
    for rows, cols, tokens in ((1, 1, 1), (5, 123, 3), (40, 576, 2)):
        values = rng.normal(size=(rows, cols)).astype(F)
        bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
        stored = {"f32": values, "f16": values.astype(np.float16), "bf16": bf16}[dtype]
        x, ids = rng.normal(size=(tokens, cols)).astype(F), rng.integers(0, rows, 4, np.int32)

        def run(ops: Ops, stored: Any = stored, x: Any = x, ids: Any = ids) -> list[np.ndarray]:
            weight = ops.weight(stored.view(np.uint8), DenseCodec(dtype), *stored.shape)
            out, copied = np.empty((len(x), len(stored)), F), np.empty((4, stored.shape[1]), F)
            ops.linear(x, [weight], [out])
            again = np.empty_like(out)
            ops.logits(x, weight, again)
            np.testing.assert_array_equal(again, out)
            ops.embed(weight, ids, copied)
            return [out, copied]

        _, copied = agrees("linear", run)
        exact = (bf16.astype(np.uint32) << 16).view(F) if dtype == "bf16" else stored.astype(F)
        np.testing.assert_array_equal(copied, exact[ids])


class Mixture(NamedTuple):
    """Three experts, a shared block of another shape, and who goes where.  The third expert has no token."""

    layout: FfnLayout
    records: list[np.ndarray]
    shared_layout: FfnLayout
    shared: np.ndarray
    x: np.ndarray
    offsets: list[int]  # five pairs of the shared block, then the experts'
    tokens: np.ndarray
    weights: np.ndarray

    def run(self, ops: Ops, rows: np.ndarray, out: np.ndarray, weights: np.ndarray | None) -> None:
        """All records in one call."""
        records = [ops.ffn_weights(record, self.layout) for record in self.records]
        block = ops.ffn_weights(self.shared, self.shared_layout)
        inputs = [ops.token_input(), ops.token_input()]
        for source, group in zip(inputs, (records[0].group, block.group), strict=True):
            ops.prepare(source, self.x, group)
        shared = (inputs[1], block.layout, block.address)
        addresses = [record.address for record in records]
        ops.expert_ffn(
            inputs[0], records[0].layout, addresses, self.offsets, self.tokens, rows, out, weights, shared
        )


def record(rng: np.random.Generator, layout: FfnLayout) -> np.ndarray:
    up = (layout.gate_up, layout.intermediate, layout.hidden)
    down = (layout.down, layout.hidden, layout.intermediate_padded)
    return pack_ffn(layout, *(matrix(rng, *which) for which in (up, up, down)))


def mixture(rng: np.random.Generator, gate_up: TileCodec, down: TileCodec) -> Mixture:
    layout = FfnLayout(192, 40, gate_up, down)  # 40 rows: two tiles and a half; 40 columns are padded
    shared_layout = FfnLayout(192, 77, TileCodec(8, 64), TileCodec(4, 32, "f16"))
    tokens = np.array([0, 1, 2, 3, 4, 0, 1, 3, 4, 0, 2], np.int32)
    return Mixture(
        layout,
        [record(rng, layout) for _ in range(3)],
        shared_layout,
        record(rng, shared_layout),
        activations_of(rng, 5, 192),
        [5, 9, 11, 11],
        tokens,
        rng.random(len(tokens)).astype(F),
    )


CODECS = [(TileCodec(bits, 32), TileCodec(bits, 32, "f16")) for bits in BITS]
CODECS += [(TileCodec(4, 64), TileCodec(3, 32)), (TileCodec(2, 32, "f16"), TileCodec(8, 64))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("gate_up", "down"), CODECS, ids=str)
def test_a_mixture_of_experts(
    gate_up: TileCodec, down: TileCodec, path: str, agrees: Check, rng: np.random.Generator
) -> None:
    given = mixture(rng, gate_up, down)
    rows = np.arange(len(given.tokens), dtype=np.int32)[::-1].copy()

    def run(ops: Ops) -> list[np.ndarray]:
        apart = np.full((len(rows), 192), np.nan, F)
        given.run(ops, rows, apart, None)
        summed = np.ones((6, 192), F)
        given.run(ops, given.tokens, summed, given.weights)
        return [apart, summed]

    apart, summed = agrees(BOUND[path], run, path, "expert_ffn")
    assert np.abs(apart).max() > 0.5
    assert (summed[5] == 1).all()  # a row that no pair names

    def combined(ops: Ops) -> list[np.ndarray]:
        out = np.ones((6, 192), F)
        ops.combine(apart[::-1].copy(), given.tokens, given.weights, out)
        return [out]

    np.testing.assert_array_equal(agrees("combine", combined)[0], summed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared", [True, False])
def test_the_kernel_groups_what_a_router_chose(
    shared: bool, path: str, agrees: Check, rng: np.random.Generator
) -> None:
    """The same bits as pairs that are grouped by hand, however many of them are computed together."""
    given = mixture(rng, *CODECS[2])
    chosen = np.stack([rng.permutation(3)[:2] for _ in given.x]).astype(np.int32)
    weights, everyone = rng.random(chosen.shape).astype(F), np.arange(5 if shared else 0, dtype=np.int32)
    shared_weights = rng.random(len(everyone)).astype(F)
    order = chosen.ravel().argsort(kind="stable")
    tokens = np.concatenate([everyone, (order // 2).astype(np.int32)])
    factors = np.concatenate([shared_weights, weights.ravel()[order]])
    ends = np.cumsum(np.bincount(chosen.ravel(), minlength=3))
    offsets = [len(everyone), *(len(everyone) + ends).tolist()]

    def run(ops: Ops) -> list[np.ndarray]:
        records = [ops.ffn_weights(record, given.layout) for record in given.records]
        block = ops.ffn_weights(given.shared, given.shared_layout)
        inputs = {group: ops.token_input() for group in (32, 64)}
        for group, source in inputs.items():
            ops.prepare(source, given.x, group)
        also = (inputs[block.group], block.layout, block.address) if shared else None
        source, layout, places = inputs[records[0].group], records[0].layout, [r.address for r in records]
        by_hand = np.ones((5, 192), F)
        ops.expert_ffn(source, layout, places, offsets, tokens, tokens, by_hand, factors, also)
        for most in (1, 4, 100):
            out = np.ones_like(by_hand)
            addresses, own = np.array(places, np.uint64), shared_weights if shared else None
            used = ops.routed_ffn(source, layout, addresses, chosen, weights, out, most, also, own)
            assert used == len(np.unique(chosen))
            np.testing.assert_array_equal(out, by_hand)
        return [by_hand]

    (out,) = agrees(BOUND[path], run, path, "routed_ffn")
    assert np.abs(out - 1).max() > 0.1


@pytest.mark.parametrize("path", PATHS)
def test_a_token_alone_gives_the_same_bits_as_in_company(
    path: str, same_bits: Check, rng: np.random.Generator
) -> None:
    """70 tokens: more than one block of 64."""
    layout = FfnLayout(64, 48, TileCodec(4, 32), TileCodec(4, 64))
    data, x = record(rng, layout), activations_of(rng, 70, 64)

    def run(ops: Ops, size: int) -> list[np.ndarray]:
        weights, out = ops.ffn_weights(data, layout), np.full((70, 64), np.nan, F)
        for begin in range(0, 70, size):
            part, source = x[begin : begin + size], ops.token_input()
            ops.prepare(source, part, 32)
            rows = np.arange(len(part), dtype=np.int32)
            here = out[begin : begin + size]
            ops.expert_ffn(source, weights.layout, [weights.address], [0, len(part)], rows, rows, here)
        return [out]

    whole = same_bits(lambda ops: run(ops, 70), path)
    for size in (1, 9):
        np.testing.assert_array_equal(whole[0], same_bits(lambda ops, n=size: run(ops, n), path)[0])


@pytest.mark.parametrize("path", PATHS)
def test_an_input_may_be_prepared_again(path: str, agrees: Check, rng: np.random.Generator) -> None:
    """More tokens, then fewer: what the larger call left behind must not show."""
    layout = FfnLayout(96, 33, TileCodec(3, 32), TileCodec(2, 32))
    data = record(rng, layout)
    batches = [rng.normal(size=(tokens, 96)).astype(F) for tokens in (2, 9, 3)]

    def run(ops: Ops) -> list[np.ndarray]:
        weights, source, outs = ops.ffn_weights(data, layout), ops.token_input(), []
        for x in batches:
            rows, out = np.arange(len(x), dtype=np.int32), np.full((len(x), 96), np.nan, F)
            ops.prepare(source, x, 32)
            ops.expert_ffn(source, weights.layout, [weights.address], [0, len(x)], rows, rows, out)
            outs.append(out)
        return outs

    agrees(BOUND[path], run, path, "expert_ffn")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_token(
    broken: float, path: str, same_bits: Check, rng: np.random.Generator
) -> None:
    """A broken weight must end as an error at the sampler; rounded to integers, a NaN would look like a number."""
    layout, codec = FfnLayout(128, 48, TileCodec(4, 64), TileCodec(3, 32)), TileCodec(4, 64)
    data, tiles = record(rng, layout), codec.pack(*matrix(rng, codec, 20, 128))
    for place in (0, 17, 127):
        x = rng.normal(size=(3, 128)).astype(F)
        x[1, place] = broken

        def run(ops: Ops, x: np.ndarray = x) -> list[np.ndarray]:
            weights, source = ops.ffn_weights(data, layout), ops.token_input()
            product, result, rows = np.zeros((3, 20), F), np.zeros((3, 128), F), np.arange(3, dtype=np.int32)
            ops.linear(x, [ops.weight(tiles, codec, 20, 128)], [product])
            ops.prepare(source, x, 64)
            ops.expert_ffn(source, weights.layout, [weights.address], [0, 3], rows, rows, result)
            return [product, result]

        for out in same_bits(run, path):
            assert not np.isfinite(out[1]).any()
            assert np.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize("path", PATHS)
def test_empty_calls(path: str, same_bits: Check, rng: np.random.Generator) -> None:
    layout = FfnLayout(64, 16, TileCodec(4, 64), TileCodec(4, 32))
    data, none = record(rng, layout), np.empty(0, np.int32)

    def run(ops: Ops) -> list[np.ndarray]:
        weights, source, out = ops.ffn_weights(data, layout), ops.token_input(), np.ones((2, 64), F)
        tiles = ops.weight(np.zeros(9 * 64, np.uint8), TileCodec(4, 64), 16, 64)
        ops.linear(np.empty((0, 64), F), [tiles], [np.empty((0, 16), F)])
        ops.embed(tiles, none, np.empty((0, 64), F))
        ops.prepare(source, np.empty((0, 64), F), 64)
        ops.expert_ffn(source, weights.layout, [], [0], none, none, out)
        ops.expert_ffn(source, weights.layout, [weights.address], [0, 0], none, none, out)
        return [out]

    assert (same_bits(run, path)[0] == 1).all()
