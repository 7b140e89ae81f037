"""Sixteen-bit floats as raw bits: numpy has no bfloat16, and we keep f16 and bf16 side by side."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

HalfType = Literal["bf16", "f16"]
U16 = NDArray[np.uint16]
F32 = NDArray[np.float32]


def half_to_f32(raw: U16, dtype: HalfType) -> F32:
    """The float32 values of raw 16-bit patterns, same shape; exact for every pattern."""
    if dtype == "f16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_half(values: F32, dtype: HalfType) -> U16:
    """The nearest 16-bit patterns (ties to even), same shape; a NaN stays a NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    # Adding 0x7fff plus the lowest kept bit carries exactly when the dropped half rounds up to even.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def is_exact(values: F32, dtype: HalfType) -> bool:
    """True when every value survives the way to ``dtype`` and back with all its bits."""
    back = half_to_f32(f32_to_half(values, dtype), dtype)
    return bool(np.array_equal(back.view(np.uint32), np.ascontiguousarray(values).view(np.uint32)))
