"""The gated delta rule in float64, twice: token by token as it is defined, and in chunks (only to check the first).

Shapes: q, k [T, Hv, Dk] (each key head repeated for its value heads), v [T, Hv, Dv], g and beta [T, Hv], state
[Hv, Dk, Dv].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashmoe.kernels.ops import F32
from flashmoe.kernels.reference_quant import F64, sigmoid


class DeltaInputs(NamedTuple):
    """What the recurrence needs of each token."""

    q: F64
    k: F64
    v: F64
    g: F64  # log of the decay, at most 0
    beta: F64


def delta_inputs(
    mixed: F32, a: F32, b: F32, a_log: F32, dt_bias: F32, shape: tuple[int, ...], key_heads: int
) -> DeltaInputs:
    """Split, normalise and repeat; shape: that of the state, the rest as in Ops.gated_delta_rule."""
    tokens, (value_heads, key_dim, value_dim) = len(mixed), shape
    keys = key_heads * key_dim
    wide = mixed.astype(np.float64)
    q = _l2_normalised(wide[:, :keys].reshape(tokens, key_heads, key_dim)) / np.sqrt(key_dim)
    k = _l2_normalised(wide[:, keys : 2 * keys].reshape(tokens, key_heads, key_dim))
    v = wide[:, 2 * keys :].reshape(tokens, value_heads, value_dim)
    a, b = a.reshape(tokens, value_heads), b.reshape(tokens, value_heads)
    softplus = np.logaddexp(0.0, a.astype(np.float64) + dt_bias)
    repeats = value_heads // key_heads
    return DeltaInputs(
        np.repeat(q, repeats, axis=1),
        np.repeat(k, repeats, axis=1),
        v,
        -np.exp(a_log.astype(np.float64)) * softplus,
        sigmoid(b.astype(np.float64)),
    )


def recurrent(x: DeltaInputs, state: F64) -> tuple[F64, F64]:
    """(out [T, Hv, Dv], state after the last token), one token after another."""
    out = np.empty(x.v.shape)
    for t in range(len(x.v)):
        state = np.exp(x.g[t])[:, None, None] * state
        read = np.einsum("hkv,hk->hv", state, x.k[t])
        change = x.beta[t][:, None] * (x.v[t] - read)
        state = state + x.k[t][:, :, None] * change[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, x.q[t])
    return out, state


def chunked(x: DeltaInputs, state: F64, size: int = 64) -> tuple[F64, F64]:
    """The same in chunks of `size` tokens: the WY representation of their product (arXiv 2406.06484, 2412.06464).

    Within a chunk all changes follow from one unit lower triangular system, because what token i reads of the
    changes of j < i is beta_i (k_i . k_j) times the decay between them.
    """
    outs = [np.empty((0, *x.v.shape[1:]))]
    for begin in range(0, len(x.v), size):
        part = DeltaInputs(*(array[begin : begin + size] for array in x))
        out, state = _chunk(part, state)
        outs.append(out)
    return np.concatenate(outs), state


def _chunk(x: DeltaInputs, state: F64) -> tuple[F64, F64]:
    q, k, v = (array.transpose(1, 0, 2) for array in x[:3])  # [Hv, c, D]
    beta, decayed = (
        x.beta.T[:, :, None],
        np.cumsum(x.g.T, axis=1),
    )  # decayed: log of the decay since the start
    earlier = np.tril(np.ones((len(x.v), len(x.v)), bool))
    between = np.exp(np.where(earlier, decayed[:, :, None] - decayed[:, None, :], -np.inf))  # [Hv, c, c]
    since_start = np.exp(decayed)[:, :, None]
    system = np.eye(len(x.v)) + np.tril((beta * k) @ k.transpose(0, 2, 1) * between, -1)
    changes = np.linalg.solve(system, beta * (v - since_start * (k @ state)))
    out = since_start * (q @ state) + (q @ k.transpose(0, 2, 1) * between) @ changes
    until_end = np.exp(decayed[:, -1:] - decayed)[:, :, None]
    state = since_start[:, -1:] * state + (until_end * k).transpose(0, 2, 1) @ changes
    return out.transpose(1, 0, 2), state


def _l2_normalised(x: F64) -> F64:
    return np.asarray(x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6), np.float64)
