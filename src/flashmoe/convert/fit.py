"""Scale and bias of a group so that the weighted square error of its values is small.

A uniform quantiser that covers the whole range of a group wastes most of two or three bits on its outliers.  Here the
error sum_i h_i (w_i - s q_i - b)^2 is minimised by turns: codes by rounding, then scale and bias by weighted least
squares (alternating minimisation, as in Lloyd 1982 with levels bound to a grid; llama.cpp's imatrix quantisers and HQQ
do alike), from several clipped ranges, because it ends in the nearest minimum.  h is the mean square of the input that
the weight multiplies: for inputs without correlation the error is that of the layer's output (Optimal Brain Surgeon's
diagonal, Hassibi and Stork 1993).
"""

from __future__ import annotations

import numpy as np

from flashmoe.bundle.codecs import U8, Quantized, ceil_div
from flashmoe.checkpoint.dtypes import F32, U16, f32_to_half, half_to_f32
from flashmoe.convert.quantize import codes_of, range_fit

# Share of the range that the first grid covers.  More starts or rounds gain 1 to 3 % of the error at 2 to 4 bits and
# take 2 to 10 times as long (docs/experiments.md).
_CLIPS = (1.0, 0.8, 0.6)
_ROUNDS = 3
# Groups worked on together: 64 KiB to 256 KiB of float32, which stays in the second-level cache through all passes.
_BLOCK_GROUPS = 1024


def fit(values: F32, bits: int, group: int, importance: F32 | None = None) -> Quantized:
    """Codes u8 [rows, cols], bf16 scales and biases [rows, ceil(cols / group)] for ``values`` [rows, cols].

    importance: [cols], not negative; None counts all columns alike.  Never worse, by that measure, than the fit by
    range, so what that holds exactly stays exact.  Values must be finite.  Pure, hence thread-safe.
    """
    rows, cols = values.shape
    groups = ceil_div(cols, group)
    weights = np.ones(cols, np.float32) if importance is None else _positive(importance)
    if cols % group:  # columns that are not there: any value, without weight
        missing = groups * group - cols
        values = np.pad(values, ((0, 0), (0, missing)), mode="edge")
        weights = np.pad(weights, (0, missing))
    per_group = weights.reshape(groups, group)
    grid = values.reshape(rows, groups, group)
    scales, biases = np.empty((2, rows, groups), np.uint16)
    codes = np.empty(grid.shape, np.uint8)
    step = max(1, _BLOCK_GROUPS // groups)
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        fitted = _fit_block(grid[block], per_group, (1 << bits) - 1)
        codes[block], scales[block], biases[block] = fitted
    return Quantized(codes.reshape(rows, -1)[:, :cols], scales, biases)


def _positive(importance: F32) -> F32:
    """Weights of mean 1; columns that no input ever reached count a little, so that no group is without weight."""
    mean = float(importance.mean(dtype=np.float64))
    if not mean > 0:
        return np.ones_like(importance)
    weights: F32 = np.maximum(importance / np.float32(mean), np.float32(1e-4))
    return weights


def _fit_block(x: F32, w: F32, top: int) -> tuple[U8, U16, U16]:
    """x [rows, groups, G], w [groups, G] -> codes like x, bf16 patterns of scales and biases [rows, groups]."""
    low, high = x.min(axis=2), x.max(axis=2)
    best_scale, best_bias = map(_value, range_fit(low, high, top))
    best = _error(x, w, best_scale, best_bias, top)
    constants = w.sum(axis=1), np.einsum("rgi,gi->rg", x, w)
    for clip in _CLIPS:
        scale = (high - low) * np.float32(clip / top)
        bias = (high + low - scale * np.float32(top)) / np.float32(2)
        scale, bias = _alternate(x, w, constants, scale, bias, top)
        error = _error(x, w, scale, bias, top)
        better = error < best
        best = np.where(better, error, best)
        best_scale = np.where(better, scale, best_scale)
        best_bias = np.where(better, bias, best_bias)
    codes = codes_of(x, best_scale, best_bias, top).astype(np.uint8)
    return codes, f32_to_half(best_scale, "bf16"), f32_to_half(best_bias, "bf16")


def _alternate(
    x: F32, w: F32, constants: tuple[F32, F32], scale: F32, bias: F32, top: int
) -> tuple[F32, F32]:
    """Scale and bias, rounded to bf16, after some rounds; the bias is the best one for the rounded scale."""
    total, wx = constants
    for turn in range(_ROUNDS):
        codes = codes_of(x, scale, bias, top)
        weighted = codes * w
        q, qq = weighted.sum(axis=2), np.einsum("rgi,rgi->rg", weighted, codes)
        qx = np.einsum("rgi,rgi->rg", weighted, x)
        spread = total * qq - q * q
        solid = spread > np.float32(1e-5) * total * qq  # else all codes are the same: any scale does
        scale = np.where(solid, (total * qx - q * wx) / np.where(solid, spread, np.float32(1)), scale)
        if turn == _ROUNDS - 1:
            scale = _value(f32_to_half(scale, "bf16"))
        bias = (wx - scale * q) / total
    return scale, _value(f32_to_half(bias, "bf16"))


def _error(x: F32, w: F32, scale: F32, bias: F32, top: int) -> F32:
    """Weighted square error [rows, groups] with the nearest codes."""
    off = codes_of(x, scale, bias, top)
    off *= scale[:, :, None]
    off += bias[:, :, None]
    off -= x
    error: F32 = np.einsum("rgi,rgi,gi->rg", off, off, w)
    return error


def _value(raw: U16) -> F32:
    return half_to_f32(raw, "bf16")
