"""Float weights to affine codes by the range of each group: exact for what lies on a grid, and fast.

Scale and bias are rounded to bf16 before the codes are chosen.  convert/fit.py improves on it below eight bits.
"""

from __future__ import annotations

import numpy as np

from flashmoe.bundle.codecs import Quantized, ceil_div
from flashmoe.checkpoint.dtypes import F32, U16, f32_to_half, half_to_f32


def quantize(values: F32, bits: int, group: int) -> Quantized:
    """Codes u8 [rows, cols], bf16 scales and biases [rows, ceil(cols / group)] for ``values`` [rows, cols].

    A group whose values lie on a grid scale * code + bias with bf16 scale and bias, and that uses the codes 0
    and 2**bits - 1, comes back exactly, whatever the sign of the scale; so does a group of one bf16 or f16
    value.
    Values must be finite (checkpoint matrices check that).
    """
    rows, cols = values.shape
    groups = ceil_div(cols, group)
    if cols % group:  # repeat the last column: it moves neither end of its group's range
        values = np.pad(values, ((0, 0), (0, groups * group - cols)), mode="edge")
    grid = values.reshape(rows, groups, group)
    top = (1 << bits) - 1
    raw_scale, raw_bias = range_fit(grid.min(axis=2), grid.max(axis=2), top)
    scale, bias = half_to_f32(raw_scale, "bf16"), half_to_f32(raw_bias, "bf16")
    codes = codes_of(grid, scale, bias, top).astype(np.uint8).reshape(rows, groups * group)
    return Quantized(codes[:, :cols], raw_scale, raw_bias)


def codes_of(grid: F32, scale: F32, bias: F32, top: int) -> F32:
    """The nearest codes 0 .. top, as float32, of values [rows, groups, G]; scale and bias [rows, groups]."""
    s, b = scale[:, :, None], bias[:, :, None]
    steps: F32 = grid - b
    np.divide(steps, np.where(s == 0, np.float32(1), s), out=steps)
    np.rint(steps, out=steps)
    np.clip(steps, 0, top, out=steps)
    steps *= s != 0
    return steps


def range_fit(low: F32, high: F32, top: int) -> tuple[U16, U16]:
    """bf16 patterns of scale and bias: code 0 sits at the end of the range that bf16 represents better.

    At 8 bits the rounding of the bias costs up to half a step, so the choice of the end matters there.
    """
    low_raw, high_raw = f32_to_half(low, "bf16"), f32_to_half(high, "bf16")
    low_error = np.abs(half_to_f32(low_raw, "bf16") - low)
    high_error = np.abs(half_to_f32(high_raw, "bf16") - high)
    from_low = low_error <= high_error
    bias_raw = np.where(from_low, low_raw, high_raw)
    bias = half_to_f32(bias_raw, "bf16")
    # The range is measured from the rounded bias, so that the far end stays within reach of the last code.
    scale = (np.where(from_low, high, low) - bias) / np.float32(top)
    flat = low == high
    scale = np.where(flat, low - bias, scale)  # one value: code 1 adds what the bias rounded away
    return f32_to_half(scale, "bf16"), bias_raw
