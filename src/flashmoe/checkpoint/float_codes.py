"""Small floats as the OCP formats define them: E4M3 and E2M1 values, E8M0 scales.

Source: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashmoe.checkpoint.dtypes import F32

U8 = NDArray[np.uint8]


def _e4m3_values() -> F32:
    """By code: sign, four bits of exponent with bias 7, three of fraction; no infinity, NaN is all ones."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    values[(code & 127) == 127] = np.nan
    return np.where(code < 128, values, -values).astype(np.float32)


E4M3 = _e4m3_values()
# E2M1, sign in bit 3.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The same as 2 * value + 12: codes of a scale half as large, with a bias of -12 of those.
FP4_CODES = (2 * FP4 + 12).astype(np.uint8)


def e4m3(codes: U8) -> F32:
    """float32 values, same shape; NaN where the code is one."""
    return E4M3[codes]


def e8m0(codes: U8) -> F32:
    """2 ** (code - 127), same shape; NaN for code 255."""
    with np.errstate(over="ignore"):
        powers = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.float32(np.nan), powers).astype(np.float32)


def nibbles(raw: U8) -> U8:
    """[rows, 2n] of bytes [rows, n], the low half of a byte first."""
    return np.stack([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1).reshape(raw.shape[0], -1)
