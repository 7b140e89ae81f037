"""How keys and values of one layer lie in memory, and their slow but obvious reading and writing in numpy.

An array [kv_heads, blocks of 16 positions, block].  A block of keys is [D, 16]: a vector register then holds one value
of 16 keys, and their scores need no sum over its lanes.  A block of values is [16, D].  D is head_dim rounded up to 16
(the rest stays zero).  Latents (multi-head latent attention) lie as the values of one head.  An int8 block ends with
its float32 scales [groups of 64 values, 16 positions]: value = code * scale with scale = max|x| / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Cache = NDArray[Any]  # float16, float32 or int8

CACHE_DTYPES: Mapping[str, DTypeLike] = {"f16": np.float16, "int8": np.int8, "f32": np.float32}
POSITIONS = 16  # of a block: the lanes of a vector register
SCALE_GROUP = 64  # values of an int8 cache that share a scale


def cache_shape(kv_heads: int, context: int, head_dim: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Shape of the array for `context` positions."""
    block = POSITIONS * _padded(head_dim)
    if np.dtype(dtype) == np.int8:
        block += 4 * POSITIONS * _groups(head_dim)
    return kv_heads, -(-context // POSITIONS), block


def store_keys(cache: Cache, position: int, x: F32) -> None:
    """Keys x [T, kv_heads, head_dim] as positions `position` on."""
    _store(cache, position, x, keys=True)


def store_values(cache: Cache, position: int, x: F32) -> None:
    """Values x [T, kv_heads, head_dim] as positions `position` on."""
    _store(cache, position, x, keys=False)


def load_keys(cache: Cache, head_dim: int) -> F64:
    """All keys [kv_heads, positions, head_dim] as they count in scores."""
    return _load(cache, head_dim, keys=True)


def load_values(cache: Cache, head_dim: int) -> F64:
    """All values [kv_heads, positions, head_dim] as they are summed."""
    return _load(cache, head_dim, keys=False)


def cache_scales(cache: Cache) -> NDArray[Any]:
    """The scales of an int8 cache, a view [kv_heads, blocks, groups * 16]."""
    # A block is 16 positions of D codes and 4 bytes for each group of 64 of them: D is found from its size.
    head_dim = next(d for d in range(16, 1025, 16) if cache_shape(1, 1, d, np.int8)[2] == cache.shape[2])
    return cache[:, :, POSITIONS * head_dim :].view(np.float32)


def _padded(head_dim: int) -> int:
    return -(-head_dim // 16) * 16


def _groups(head_dim: int) -> int:
    return -(-head_dim // SCALE_GROUP)


def _codes(cache: Cache, head_dim: int, keys: bool) -> NDArray[Any]:
    """A view [kv_heads, blocks, 16 positions, head_dim]."""
    codes = cache[:, :, : POSITIONS * _padded(head_dim)]
    if keys:
        codes = codes.reshape(*cache.shape[:2], _padded(head_dim), POSITIONS).swapaxes(2, 3)
    return codes.reshape(*cache.shape[:2], POSITIONS, _padded(head_dim))[..., :head_dim]


def _scales(cache: Cache, head_dim: int) -> NDArray[Any]:
    """A view [kv_heads, blocks, 16 positions, groups] of an int8 cache."""
    return cache_scales(cache).reshape(*cache.shape[:2], _groups(head_dim), POSITIONS).swapaxes(2, 3)


def _store(cache: Cache, position: int, x: F32, keys: bool) -> None:
    head_dim = x.shape[2]
    codes = _codes(cache, head_dim, keys)
    assert np.shares_memory(codes, cache)
    for t, row in enumerate(x, position):
        at = (slice(None), t // POSITIONS, t % POSITIONS)
        if cache.dtype == np.int8:
            scales = _scales(cache, head_dim)[at]
            for g in range(_groups(head_dim)):
                part = slice(g * SCALE_GROUP, (g + 1) * SCALE_GROUP)
                codes[at][:, part], scales[:, g] = _quantized(row[:, part])
        else:
            codes[at] = row


def _quantized(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Codes [kv_heads, n] and scales [kv_heads], in float32 as every backend computes them."""
    scales = np.abs(x).max(1) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 1e-37)
    return np.rint(x * inverse[:, None]).astype(np.int8), scales


def _load(cache: Cache, head_dim: int, keys: bool) -> F64:
    plain = _codes(cache, head_dim, keys).astype(np.float64)
    if cache.dtype == np.int8:
        scales = np.repeat(_scales(cache, head_dim), SCALE_GROUP, axis=3)
        plain *= scales[..., :head_dim]
    return plain.reshape(cache.shape[0], -1, head_dim)
