"""Random weights that a network can run on, made faster than a drive writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from flashmoe.bundle.codecs import TILE_ROWS, U8, TileCodec
from flashmoe.checkpoint.dtypes import F32, f32_to_half, half_to_f32

_CHUNK_TILES = 1 << 15
_MOST_CHOSEN = 0.45  # a larger scale cannot make an expert be chosen by half of all tokens or more


class TilePool:
    """Tiles of uniform random codes with mean 0 and standard deviation 1 / sqrt(fan_in) within a factor 1.5.

    ``nbytes`` random bytes are drawn once; every matrix copies its tiles from another place of them.
    """

    def __init__(self, codec: TileCodec, fan_in: float, nbytes: int, rng: np.random.Generator) -> None:
        self._count = nbytes // codec.tile_nbytes
        self._tiles = np.frombuffer(rng.bytes(self._count * codec.tile_nbytes), np.uint8).copy()
        self._tiles = self._tiles.reshape(self._count, codec.tile_nbytes)
        # A power of two makes the bias, minus the mean of the values before it, exact in bf16: the mean is truly 0.
        values = np.array(codec.table or range(1 << codec.bits))
        scale = 2.0 ** round(math.log2(1 / values.std() / math.sqrt(fan_in)))
        pair = np.array([scale, -scale * values.mean()], np.float32)
        halves = f32_to_half(pair, codec.scale_dtype)
        self._tiles[:, -4 * TILE_ROWS :] = np.repeat(halves, TILE_ROWS).astype("<u2").view(np.uint8)

    def tiles(self, count: int, where: int) -> Iterator[U8]:
        """``count`` tiles in chunks, from a place that the number ``where`` decides."""
        start = where % self._count
        while count:
            take = min(count, self._count - start, _CHUNK_TILES)
            yield self._tiles[start : start + take]
            count, start = count - take, (start + take) % self._count


def router_tiles(
    codec: TileCodec, shape: tuple[int, ...], chosen: int, skew: float, rng: np.random.Generator
) -> U8:
    """A router gate [experts, hidden] that picks its r-th favourite expert ever less often.

    With random rows the logit of expert e is normal with a deviation f_e in proportion to its row's scale, and
    it is among the ``chosen`` when it exceeds a common threshold t: with probability Q(t / f_e).  Solving
    Q(t / f_e) = p_e for a Zipf-like p_e gives the scale of each row.  Without a bias no expert can be chosen
    half of the time or more.  Which expert has which rank is random.
    """
    experts, hidden = shape
    factors = rng.permutation(row_factors(experts, chosen, skew)).astype(np.float32)
    scales = factors[:, None] * np.float32(_unit_scale(codec.bits) / math.sqrt(hidden))
    scales = np.broadcast_to(scales, (experts, hidden // codec.group))
    codes = rng.integers(0, 1 << codec.bits, (experts, hidden), dtype=np.uint8)
    raw = f32_to_half(scales, codec.scale_dtype)
    biases = half_to_f32(raw, codec.scale_dtype) * np.float32(-((1 << codec.bits) - 1) / 2)
    return codec.pack(codes, raw, f32_to_half(biases, codec.scale_dtype))


def row_factors(experts: int, chosen: int, skew: float) -> F32:
    """f_e of router_tiles by rank, favourite first; all 1 for a skew of 0."""
    even = min(chosen / experts, _MOST_CHOSEN)
    normal = NormalDist()
    threshold = normal.inv_cdf(1 - even)
    shares = _capped_zipf(experts, even * experts, skew)
    return np.array([threshold / normal.inv_cdf(1 - p) for p in shares], np.float32)


def _capped_zipf(count: int, total: float, skew: float) -> list[float]:
    """min(cap, c * r**-skew) for ranks r = 1..count, with the c that makes their sum ``total``."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -skew
    low, high = 0.0, _MOST_CHOSEN / float(weights[-1])  # at ``high`` all are capped
    for _ in range(100):  # halving 2**-53 apart even for the 4e12 of 1000 experts and a skew of 4
        middle = (low + high) / 2
        if np.minimum(_MOST_CHOSEN, middle * weights).sum() < total:
            low = middle
        else:
            high = middle
    return [float(share) for share in np.clip(high * weights, 1e-6, _MOST_CHOSEN)]


def vector_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> F32:
    """Values in the range of trained models: norms 1, decays and time steps as Mamba initialises them."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "conv1d":
        bound = 1 / math.sqrt(shape[-1])
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    if kind == "A_log":
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if kind == "dt_bias":
        step = np.exp(rng.uniform(math.log(1e-3), math.log(0.1), shape))
        return np.log(np.expm1(step)).astype(np.float32)  # softplus of it is the step
    if kind == "e_score_correction_bias":
        return np.zeros(shape, np.float32)
    if kind in ("bias", "sinks"):
        return rng.normal(0.0, 0.05, shape).astype(np.float32)
    return np.ones(shape, np.float32)


def _unit_scale(bits: int) -> float:
    """The scale that gives uniform codes a standard deviation of 1."""
    return math.sqrt(12 / ((1 << bits) ** 2 - 1))
