"""The contract of a backend: every operation that blocks call, its shapes, its mathematics, and how exact it must be.

Rules for all of them.  Arrays are C-contiguous and float32 unless said; T is the number of tokens of a call, 1 in
decode; results go to `out`, which the caller owns.  A token's result depends neither on T (a prompt in one call, in odd
pieces or token by token gives the same bits) nor on threads or instruction set.  Wrong shapes raise ValueError, wrong
dtypes or layouts TypeError; nothing is converted silently, since a converted `out` would lose the result.  An empty
call (T = 0) is legal and leaves everything as it is.  Not thread-safe: one backend object per inference thread.

The mathematics is that of transformers' modeling_qwen3_5_moe.py; papers are named where one defines an operation.
flashmoe.kernels.reference says the same in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flashmoe.bundle.codecs import U8, DenseCodec, FfnLayout, TileCodec
from flashmoe.kernels.kv_cache import Cache

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]


class Tolerance(NamedTuple):
    """Largest |backend - reference| of an element: absolute + relative * |reference|."""

    relative: float
    absolute: float


# For inputs of the order of one and up to 512 summands; 1.2e-7 is one rounding (float32's epsilon).  The reference sums
# in float64, so the absolute part covers cancellation: a few roundings of the largest partial sum.
TOLERANCE: Mapping[str, Tolerance] = {
    "rms_norm": Tolerance(1e-6, 0.0),  # a product: nothing cancels, also for rows of 1e-6
    "add_rms_norm": Tolerance(1e-6, 0.0),  # both round x + delta first
    "gated_rms_norm": Tolerance(2e-6, 1e-35),  # gates below -88: see sigmoid
    # exp saturates at e^88, so nothing below 1 / (1 + e^88) = 6e-39 comes out.
    "sigmoid": Tolerance(1e-6, 1e-38),
    "causal_conv1d": Tolerance(2e-6, 1e-6),
    "gated_delta_rule": Tolerance(0.0, 2e-6),  # decay < 1 lets rounding errors fade
    "attention_prepare": Tolerance(2e-6, 1e-6),
    # One unit of a float16 cache's last place, where both sides rounded differently: 2^-10; subnormals 6e-8.
    "attention_prepare/f16": Tolerance(1e-3, 1e-7),
    # A key that float32 and float64 round to different codes: a step of 1/127 of its group's largest.
    "attention_prepare/int8": Tolerance(0.0, 4e-2),
    "attention": Tolerance(0.0, 2e-6),  # a weighted mean of values of the order of one
    "mla_prepare": Tolerance(2e-6, 1e-6),
    "mla_prepare/f16": Tolerance(1e-3, 1e-7),  # as for attention_prepare, here and below
    "mla_prepare/int8": Tolerance(0.0, 4e-2),
    "mla_attention": Tolerance(0.0, 4e-6),  # one chain of additions over spans of 2,048 keys
    # The weights; the chosen experts are equal.  A difference of 80 is rounded by 4e-6, and so is its exponential.
    "route": Tolerance(1e-5, 1e-37),
    "route_grouped": Tolerance(2e-6, 1e-37),
    "embed": Tolerance(0.0, 0.0),  # dequantisation is defined to the bit
    "head_linear": Tolerance(0.0, 2e-5),
    "logits": Tolerance(0.0, 2e-5),
    "linear": Tolerance(0.0, 2e-5),  # on both activation paths: planes and integer sums are exact
    "combine": Tolerance(2e-7, 0.0),
    "expert_ffn": Tolerance(0.0, 2e-5),
    "routed_ffn": Tolerance(0.0, 2e-5),
    # About one hidden value in 20,000 lies so near a half that float32 and float64 round it to different sides: a
    # step of 1/127 of its group's largest (1/16,256 where the low plane counts) times a weight of the down matrix.
    # At least nine results in ten keep within the bound above.
    "expert_ffn/int8": Tolerance(0.0, 1e-2),
}


class FfnRecord(Protocol):
    """A feed-forward record in memory (docs/format.md), ready for expert_ffn."""

    @property
    def layout(self) -> Any:
        """The record's shape in the backend's form."""

    @property
    def address(self) -> int:
        """Where its bytes start."""

    @property
    def group(self) -> int:
        """Columns of a gate or up tile: the group size for prepare()."""


class WeightOps(Protocol):
    """Binding bytes of a bundle to a backend.  Handles belong to the backend that made them; their type is its own."""

    def weight(
        self, data: U8, codec: TileCodec | DenseCodec, rows: int, cols: int, bias: F32 | None = None
    ) -> Any:
        """A matrix [rows, cols] over its bytes, for linear and embed; keeps the arrays alive.

        bias [rows] is added to every product with the matrix.
        """

    def ffn_layout(self, layout: FfnLayout) -> Any:
        """A record's shape in the backend's form."""

    def ffn_weights(self, data: U8, layout: FfnLayout) -> FfnRecord:
        """A record in memory; keeps the array alive."""

    def token_input(self) -> Any:
        """Room for prepared activations; only grows."""

    def read_bandwidth(self, data: U8) -> float:
        """Bytes per second at which the backend reads `data`."""

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the backend's own scratch memory."""


class MatrixOps(Protocol):
    """Products with stored weights.

    On the "int8" path the input of a product with tiles is quantised per group of a row; on the "f32" path, the
    accuracy oracle, it is used as it is.  Unquantised (dense) matrices always see the input as it is.

    int8, G values x with m = max|x|:  x ~ m / 127 * (high + low / 128), high = round(127 x / m), low = round(128 (127 x
    / m - high)), halves to even.  low counts in groups whose m exceeds COARSE_LIMIT times the root mean square of the
    row (COARSE_LIMIT_GATED where x are `gated`, as between the products of a feed-forward block), and in all groups of
    `precise` calls.
    A row of W is sum over groups of scale * (codes . x) + bias * sum(x), both with the quantised x.  A token with a
    value that is not finite (or above 1e19) gives NaN.
    """

    def linear(
        self,
        x: F32,
        weights: Sequence[Any],
        outs: Sequence[F32],
        precise: bool = False,
        gated: bool = False,
    ) -> None:
        """outs[i][t, :] = W_i x[t] (+ bias_i); x [T, K], W_i [N_i, K], outs[i] [T, N_i]; at most 8 matrices.

        precise: low planes count everywhere (routers, whose small differences decide).  gated: x are
        products of values and gates; their limit is COARSE_LIMIT_GATED.
        """

    def logits(self, x: F32, weight: Any, out: F32) -> None:
        """out[t, :] = W x[t] (+ bias), once more with low planes everywhere where it is large; out [T, N].

        Computed again are the rows of a token's SURE_TILES tiles with the largest results so far, the first of equal
        ones; a tile is 16 rows from a multiple of 16 on.  So likely tokens are as exact as in precise products, the
        others as exact as in any, and a vocabulary of 248,320 costs eight tokens half as much.
        """

    def head_linear(self, x: F32, weight: Any, out: F32, precise: bool = False) -> None:
        """out[t, h, :N] = W_h x[t, h, :K] with a matrix for each head; W [heads * N, K] holds one after another.

        x [T, heads, >= K] and out [T, heads, >= N]; what lies beyond is neither read nor written.  N: a multiple of 16
        for a matrix of tiles.  The absorbed projections of latent attention.
        """

    def embed(self, table: Any, ids: I32, out: F32) -> None:
        """out[t] = row ids[t] of the table, scale * code + bias in float32; ids int32 [T], out [T, K]."""

    def prepare(self, input: Any, x: F32, group: int) -> None:
        """Quantise x [T, K] in groups of 32 or 64 for any number of expert_ffn calls.

        On the f32 path the input refers to x: it must stay alive and unchanged until the last of those calls.
        """

    def expert_ffn(
        self,
        input: Any,
        layout: Any,
        addresses: Sequence[int],
        offsets: Sequence[int],
        tokens: I32,
        rows: I32,
        out: F32,
        weights: F32 | None = None,
        shared: tuple[Any, Any, int] | None = None,
    ) -> None:
        """Feed-forward blocks y = W_down (silu(W_gate x) * (W_up x)) of several records in one call.

        A layout with a clamped GLU (bundle.codecs.ClampedGlu) joins gate and up by that; biases are added to the three
        products where the layout has them, before weights apply.

        Pair p is token tokens[p] and result row rows[p].  The record at addresses[j], of shape `layout`, serves the
        pairs offsets[j] <= p < offsets[j + 1].  `shared` (input, layout, address) is one more record, of a shape of its
        own, for the pairs below offsets[0]; it counts as the first and is precise.

        Without weights: out[rows[p]] = y (rows must differ).  With weights [P]: out[rows[p]] = fma(weights[p], y,
        out[rows[p]]), records in the order given: the sum of a mixture of experts has one fixed order.
        """

    def routed_ffn(
        self,
        input: Any,
        layout: Any,
        addresses: U64,
        chosen: I32,
        weights: F32,
        out: F32,
        most_pairs: int,
        shared: tuple[Any, Any, int] | None = None,
        shared_weights: F32 | None = None,
    ) -> int:
        """A layer whose experts are all in memory: expert_ffn with weights, grouped by the kernel; the same bits.

        out[t] += shared_weights[t] * shared(x[t]), then weights[t, i] * expert chosen[t, i] by ascending number, one
        fused multiply-add each; chosen int32 [T, k], weights [T, k], out [T, H].  addresses uint64 [E], 0 where there
        is none: to choose it raises ValueError.  most_pairs: computed together, but whole experts always; scratch
        memory grows with it.  Returns how many different experts were chosen.
        """

    def combine(self, y: F32, rows: I32, weights: F32, out: F32) -> None:
        """out[rows[p]] = fma(weights[p], y[p], out[rows[p]]) for p ascending; y [>= P, H], rows int32 [P], out [R, H].

        Bit for bit what expert_ffn with weights does, for results that were kept apart.
        """


class FloatOps(Protocol):
    """Everything between the products."""

    def sigmoid(self, x: F32, out: F32) -> None:
        """out = 1 / (1 + exp(-x)), any shape; out may be x."""

    def rms_norm(self, x: F32, w: F32, eps: float, out: F32) -> None:
        """out = x / sqrt(mean(x^2) + eps) * w per row; x, out [T, H], w [H]; out may be x (arXiv 1910.07467)."""

    def add_rms_norm(self, x: F32, delta: F32, w: F32, eps: float, out: F32) -> None:
        """x += delta in place, then rms_norm(x): the residual and the next block's norm in one pass."""

    def gated_rms_norm(self, o: F32, z: F32, w: F32, eps: float, out: F32) -> None:
        """out = o / sqrt(mean(o^2) + eps) * w * silu(z) per row of len(w) values; o, z, out of one size."""

    def causal_conv1d(self, u: F32, w: F32, states: Sequence[F32], ends: Sequence[int], out: F32) -> None:
        """out[t, c] = silu(sum over j of w[j, c] * u[t - J + 1 + j, c]); u, out [T, C], w [J, C], taps outermost.

        Rows of one sequence follow those of another: sequence i has those up to ends[i] that no earlier one has.
        states[i] [J - 1, C] holds the rows before them and then the last J - 1 rows of (state, rows).  J >= 2.
        """

    def gated_delta_rule(
        self,
        mixed: F32,
        a: F32,
        b: F32,
        a_log: F32,
        dt_bias: F32,
        states: Sequence[F32],
        ends: Sequence[int],
        out: F32,
        key_heads: int,
    ) -> None:
        """The recurrence of a Gated DeltaNet (arXiv 2412.06464), token by token.

        mixed [T, 2 * Hk * Dk + Hv * Dv] holds q, k and v side by side; a, b [T, Hv]; a_log, dt_bias [Hv]; out
        [T, Hv, Dv].  states[i] [Hv, Dk, Dv], in and out, is that of sequence i, whose rows end at ends[i] as in
        causal_conv1d.  Dk: a multiple of 4, at most 512.  Value head h uses key head h // (Hv / Hk); l2(x) = x /
        sqrt(sum(x^2) + 1e-6).

            q = l2(q) / sqrt(Dk),  k = l2(k),  beta = sigmoid(b),  g = -exp(a_log) * softplus(a + dt_bias)
            S = exp(g) S;  d = beta (v - S^T k);  S = S + k d^T;  out = S^T q
        """

    def attention_prepare(
        self,
        q_gate: F32,
        k: F32,
        v: F32,
        q_norm: F32 | None,
        k_norm: F32 | None,
        eps: float,
        cos: F32,
        sin: F32,
        position: int,
        q_out: F32,
        keys: Cache,
        values: Cache,
    ) -> None:
        """Normalise and rotate queries and keys; append keys and values to the cache.

        q_gate [T, Hq * 2D]: per head D values of the query, then D of the gate (not read here); without a gate [T, Hq *
        D].  k, v [T, Hkv * D]; q_norm, k_norm [D], None for no norm; q_out [T, Hq, D]; keys, values: caches of
        kernels/kv_cache.py, positions `position` on.
        cos, sin [context, R / 2]: rotation of the pairs (i, i + R / 2) of the first R <= D values (arXiv 2104.09864).
        D <= 512.
        """

    def attention(
        self,
        q: F32,
        keys: Cache,
        values: Cache,
        position: int,
        q_gate: F32 | None,
        out: F32,
        window: int = 0,
        sinks: F32 | None = None,
    ) -> None:
        """Causal grouped-query attention, with an output gate unless q_gate is None.

        Token t sees the keys 0 .. position + t; query head h reads key/value head h // (Hq / Hkv).  out [T, Hq * D] =
        softmax(q . k / sqrt(D)) v * sigmoid(gate); q [T, Hq, D], the others as in attention_prepare.  Online softmax in
        blocks of 256 keys at fixed positions (arXiv 1805.02867), so that T does not change a bit.

        window W > 0: token t sees only the last W of its keys, itself included.  sinks [Hq]: a score of each head that
        takes part in the softmax and has the value zero (gpt-oss; arXiv 2309.17453).
        """

    def mla_prepare(
        self,
        q: F32,
        latents: F32,
        norm: F32,
        eps: float,
        cos: F32,
        sin: F32,
        interleaved: bool,
        position: int,
        q_out: F32,
        cache: Cache,
    ) -> None:
        """Rotated parts of queries and keys of latent attention; latents to the cache (arXiv 2405.04434).

        q [T, H, N + R]: a head's part without positions, then the rotated one; latents [T, C + R]: the latent, then the
        rotated key that all heads share; norm [C]; q_out [T, H, C + R]: its last R values are written (the first C come
        from head_linear).  cache: positions `position` on, C + R values each, the latent normalised.  cos, sin
        [context, R / 2] turn the pairs (i, i + R / 2) or, interleaved, (2i, 2i + 1), which are then stored as the
        former.  C + R <= 640.
        """

    def mla_attention(self, q: F32, cache: Cache, position: int, scale: float, out: F32) -> None:
        """Causal latent attention, absorbed: all heads read one cache of keys, whose first C values are the values.

        Token t sees 0 .. position + t; out [T, H, C] = softmax(scale * q . key) key[:C]; q [T, H, C + R].  The running
        maximum moves every 256 keys, and sums are kept apart for spans of 2,048 keys, at fixed positions, so that T
        does not change a bit.
        """

    def route(self, logits: F32, k: int, chosen: I32, weights: F32, renormalise: bool = True) -> None:
        """The k experts of largest logit, and their softmax: over them alone or, without renormalise, over all experts.

        logits [T, E]; chosen int32, weights [T, k].  Sorted by falling weight; of equal logits the lower expert number
        comes first.  Raises RuntimeError when a logit is not a number.
        """

    def route_grouped(
        self,
        logits: F32,
        bias: F32,
        k: int,
        groups: int,
        topk_groups: int,
        normalise: bool,
        scale: float,
        chosen: I32,
        weights: F32,
    ) -> None:
        """Sigmoid routing with a correction bias and groups (DeepSeek-V3, arXiv 2412.19437).

        s = sigmoid(logits) [T, E]; s + bias decides: only experts of the topk_groups best of `groups` equal groups
        count (a group's worth is the sum of its best two), of these the k best.  weights = s (without bias) of these,
        divided by their sum + 1e-20 where `normalise`, times scale.  Sorted by falling s + bias; of equals the lower
        number first.  Raises RuntimeError when a logit is not a number.
        """


class Ops(WeightOps, MatrixOps, FloatOps, Protocol):
    """All of a backend."""
