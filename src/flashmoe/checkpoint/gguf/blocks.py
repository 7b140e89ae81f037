"""Blocks of GGML's quantised types that are affine by groups of 32: their codes, scales and biases.

Source: ggml-quants.c and ggml-common.h; compared with the gguf package in tests/checkpoint/gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.float_codes import FP4_CODES, e8m0
from flashmoe.checkpoint.matrices import AffineRows, ScaleType
from flashmoe.checkpoint.tensors import U8

GROUP = 32
# IQ4_NL and IQ4_XS: sixteen steps that are no grid, all of them whole numbers.
_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_NONLINEAR_CODES = (_NONLINEAR + 128).astype(np.uint8)


@dataclass(frozen=True)
class BlockType:
    """``rounded``: scales are products that 16 bits do not hold exactly; ``codes`` of blocks u8 [n, bytes]."""

    bits: int
    scale_type: ScaleType
    rounded: bool
    codes: Callable[[U8], AffineRows]


def _half(blocks: U8, at: int) -> F32:
    """float32 [n, 1] of the f16 at a byte of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _halves(packed: U8) -> U8:
    """Codes [n, 2m] of bytes [n, m]: low halves first, then high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _fifth_bits(blocks: U8, at: int) -> U8:
    """Bit 4 of 32 codes, [n, 32], from a 32-bit word."""
    word = np.ascontiguousarray(blocks[:, at : at + 4])
    return np.unpackbits(word, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: U8) -> AffineRows:
    scale = _half(blocks, 0)
    return AffineRows(_halves(blocks[:, 2:]), scale, np.float32(-8) * scale)


def _q4_1(blocks: U8) -> AffineRows:
    return AffineRows(_halves(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: U8) -> AffineRows:
    scale = _half(blocks, 0)
    return AffineRows(_halves(blocks[:, 6:]) | _fifth_bits(blocks, 2), scale, np.float32(-16) * scale)


def _q5_1(blocks: U8) -> AffineRows:
    codes = _halves(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return AffineRows(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: U8) -> AffineRows:
    scale = _half(blocks, 0)
    return AffineRows(blocks[:, 2:] ^ np.uint8(0x80), scale, np.float32(-128) * scale)


def _iq4_nl(blocks: U8) -> AffineRows:
    scale = _half(blocks, 0)
    return AffineRows(_NONLINEAR_CODES[_halves(blocks[:, 2:])], scale, np.float32(-128) * scale)


def mxfp4_entries(blocks: U8) -> AffineRows:
    """FP4 codes of MXFP4 blocks in place of FP4_CODES."""
    halves = e8m0(blocks[:, :1]) * np.float32(0.5)
    return AffineRows(_halves(blocks[:, 1:]), halves, np.float32(-12) * halves)


def _mxfp4(blocks: U8) -> AffineRows:
    entries = mxfp4_entries(blocks)
    return entries._replace(codes=FP4_CODES[entries.codes])


def _k_scales(blocks: U8) -> tuple[F32, F32]:
    """Scales and minima of eight groups, [n, 8] each, from twelve bytes of six-bit numbers at byte 4."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _k_nibbles(packed: U8) -> U8:
    """Codes [n, 256] of 128 bytes: each 32 bytes hold a group in their low halves and the next in their high ones."""
    return _halves(packed.reshape(-1, 4, 32)).reshape(-1, 256)


def _q4_k(blocks: U8) -> AffineRows:
    return AffineRows(_k_nibbles(blocks[:, 16:]), *_k_scales(blocks))


def _q5_k(blocks: U8) -> AffineRows:
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    codes = _k_nibbles(blocks[:, 48:]) | high.reshape(-1, 256) << np.uint8(4)
    return AffineRows(codes, *_k_scales(blocks))


def _iq4_xs(blocks: U8) -> AffineRows:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & np.uint8(15)).reshape(-1, 8)
    six = low | (high >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)) << np.uint16(4)
    scales = _half(blocks, 0) * (six.astype(np.float32) - np.float32(32))
    codes = _NONLINEAR_CODES[_halves(blocks[:, 8:].reshape(-1, 8, 16))]
    return AffineRows(codes.reshape(-1, 256), scales, np.float32(-128) * scales)


def _tq2_0(blocks: U8) -> AffineRows:
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts & np.uint8(3)
    scales = np.repeat(_half(blocks, 64), 8, axis=1)
    return AffineRows(codes.reshape(-1, 256), scales, -scales)


AFFINE = {
    "Q4_0": BlockType(4, "F16", False, _q4_0),
    "Q4_1": BlockType(4, "F16", False, _q4_1),
    "Q5_0": BlockType(5, "F16", False, _q5_0),
    "Q5_1": BlockType(5, "F16", False, _q5_1),
    "Q8_0": BlockType(8, "F16", False, _q8_0),
    "Q4_K": BlockType(4, "F16", True, _q4_k),
    "Q5_K": BlockType(5, "F16", True, _q5_k),
    "IQ4_NL": BlockType(8, "F16", False, _iq4_nl),
    "IQ4_XS": BlockType(8, "F16", True, _iq4_xs),
    "MXFP4": BlockType(5, "BF16", False, _mxfp4),
    "TQ2_0": BlockType(2, "F16", False, _tq2_0),
}
# What is dequantised and quantised anew: bits that add little to the error that the type has itself (docs/formats.md).
# Groups of 16 meet in one of 32, so that its range is the wider one's.
REFITTED = {
    "Q2_K": 4,
    "Q3_K": 4,
    "Q6_K": 8,
    "IQ1_S": 4,
    "IQ1_M": 4,
    "IQ2_XXS": 4,
    "IQ2_XS": 4,
    "IQ2_S": 4,
    "IQ3_XXS": 4,
    "IQ3_S": 4,
    "NVFP4": 8,
    "TQ1_0": 8,
}
