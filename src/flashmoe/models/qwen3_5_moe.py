"""Qwen3.5-MoE (text): hybrid of Gated DeltaNet and gated attention, every layer with experts.  Also runs Qwen3-Next."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashmoe.models.qwen3_5_config import FULL, Qwen35Config
from flashmoe.nn.attention import AttentionShape, GatedAttention, KeyValueCache, RotaryTable
from flashmoe.nn.delta_net import DeltaNetShape, DeltaNetState, GatedDeltaNet
from flashmoe.nn.moe import FEW, DenseMlp, Experts, Foresight, MoeShape, SparseMoe
from flashmoe.nn.weights import F32, I32, Weights
from flashmoe.nn.workspace import Workspace


class SequenceState:
    """All that one sequence carries: its length and every layer's cache or recurrent state."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers  # DeltaNetState or KeyValueCache, as the layer's mixer is
        self.position = 0

    def arrays(self) -> list[NDArray[Any]]:
        """Views of all that the sequence's `position` tokens have left: copies of them are a snapshot of it."""
        return [array for layer in self.layers for array in layer.arrays(self.position)]

    def restore(self, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Become the sequence that a snapshot (copies of arrays() at `position`) was taken of."""
        self.position = position
        for mine, saved in zip(self.arrays(), arrays, strict=True):
            mine[...] = saved

    def clear(self) -> None:
        """Start a new sequence in the same memory."""
        self.position = 0
        for layer in self.layers:
            layer.clear()


BatchPart = tuple[SequenceState, slice]


class Qwen35Moe:
    """The decoder.  `embed` turns token ids [tokens] int32 into hidden rows: `embed(ids, out)`.

    Not thread-safe; one call at a time.
    """

    def __init__(
        self,
        config: Qwen35Config,
        weights: Weights,
        ops: Any,
        *,
        embed: Callable[[I32, F32], None],
        context: int,
        experts_per_token: int | None = None,
    ) -> None:
        self.config, self._ops, self._embed = config, ops, embed
        self.context = context
        self._work = Workspace()
        rotary = RotaryTable(
            context if FULL in config.layer_types else 0, config.rotary_dim, config.rope_theta
        )
        per_token = experts_per_token or config.num_experts_per_tok
        self._mixers: list[GatedDeltaNet | GatedAttention] = []
        self._ffns: list[SparseMoe | DenseMlp] = []
        self._norms: list[tuple[F32, F32]] = []
        for i in range(config.num_hidden_layers):
            prefix = f"layers.{i}."
            if config.is_linear(i):
                shape = delta_net_shape(config)
                self._mixers.append(GatedDeltaNet(weights, prefix + "linear_attn.", shape, ops))
            else:
                self._mixers.append(
                    GatedAttention(weights, prefix + "self_attn.", attention_shape(config), rotary, ops)
                )
            self._ffns.append(_ffn(config, weights, i, per_token, ops))
            names = ("input_layernorm", "post_attention_layernorm")
            first, second = (weights.vector(prefix + name, config.hidden_size) for name in names)
            self._norms.append((first, second))
        self._final_norm = weights.vector("norm", config.hidden_size)
        head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._head = [weights.matrix(head, config.vocab_size, config.hidden_size)]

    def new_state(self, kv_dtype: DTypeLike) -> SequenceState:
        """An empty sequence of at most `context` tokens."""
        config = self.config
        layers: list[Any] = []
        for i in range(config.num_hidden_layers):
            if config.is_linear(i):
                layers.append(DeltaNetState.zeros(delta_net_shape(config)))
            else:
                layers.append(KeyValueCache(attention_shape(config), self.context, kv_dtype))
        return SequenceState(layers)

    def forward(self, ids: I32, state: SequenceState, experts: Experts, logits_of: str = "last") -> F32:
        """Append tokens to one sequence; logits [rows, vocab] of "all" positions, of the "last" or of "none"."""
        rows = {"all": slice(None), "last": slice(-1, None), "none": slice(0)}[logits_of]
        return self.forward_batch(ids, [(state, slice(0, len(ids)))], experts, rows)

    def forward_batch(
        self, ids: I32, parts: Sequence[BatchPart], experts: Experts, rows: slice | list[int]
    ) -> F32:
        """Append tokens to several sequences: ids [tokens] of one after the other, each with its range of them.

        Logits [len(rows), vocab] of the wanted rows; the array is reused by the next call.  No sequence's results
        depend on the others.  When a read fails all states are left half advanced: clear them.
        """
        ops, work, eps, tokens = self._ops, self._work, self.config.rms_norm_eps, len(ids)
        x = work.get("x", (tokens, self.config.hidden_size))
        h = work.get("h", x.shape)
        delta = work.get("delta", x.shape)
        self._embed(ids, x)
        for i, mixer in enumerate(self._mixers):
            first, second = self._norms[i]
            if i == 0:
                ops.rms_norm(x, first, eps, h)
            else:
                ops.add_rms_norm(x, delta, first, eps, h)
            if isinstance(mixer, GatedDeltaNet):
                mixer(h, [(state.layers[i], own) for state, own in parts], work, delta)
            else:
                mixer(h, [(state.layers[i], state.position, own) for state, own in parts], work, delta)
            ops.add_rms_norm(x, delta, second, eps, h)
            self._ffns[i](h, experts, work, delta, self._foresight(i + 1, x))
        ops.add_rms_norm(x, delta, self._final_norm, eps, h)
        for state, own in parts:
            state.position += own.stop - own.start
        return self._logits(h[rows])

    @staticmethod
    def state_nbytes(config: Qwen35Config, context: int, kv_dtype: DTypeLike, sequences: int = 1) -> int:
        """Bytes that grow with the context when it is full: states, rotary tables, the kernels' partial results."""
        each = 0
        for i in range(config.num_hidden_layers):
            if config.is_linear(i):
                each += DeltaNetState.nbytes_of(delta_net_shape(config))
            else:
                each += KeyValueCache.nbytes_of(attention_shape(config), context, kv_dtype)
        shared = RotaryTable.nbytes_of(context, config.rotary_dim)
        return sequences * each + shared + KeyValueCache.parts_nbytes(attention_shape(config), context)

    @staticmethod
    def state_traffic(config: Qwen35Config) -> int:
        """Bytes of state that one token reads and writes, short of the KV cache (which grows with the text)."""
        layers = sum(config.is_linear(i) for i in range(config.num_hidden_layers))
        return 2 * layers * DeltaNetState.nbytes_of(delta_net_shape(config))

    @staticmethod
    def position_nbytes(config: Qwen35Config, kv_dtype: DTypeLike) -> int:
        """Bytes of keys and values that a token reads of each position before it, scales of int8 ones aside."""
        layers = sum(not config.is_linear(i) for i in range(config.num_hidden_layers))
        return 2 * layers * config.num_key_value_heads * config.head_dim * np.dtype(kv_dtype).itemsize

    @staticmethod
    def float_work(config: Qwen35Config) -> tuple[int, int]:
        """Float multiply-adds of a token: (in the recurrences, in attention for each position before it)."""
        delta, attention = delta_net_shape(config), attention_shape(config)
        linear = sum(config.is_linear(i) for i in range(config.num_hidden_layers))
        recurrence = 4 * delta.value_heads * delta.key_dim * delta.value_dim
        per_position = 2 * attention.heads * attention.head_dim
        return linear * recurrence, (config.num_hidden_layers - linear) * per_position

    @staticmethod
    def workspace_nbytes(config: Qwen35Config, tokens: int, sequences: int = 1) -> int:
        """Upper bound of the scratch memory of a call with `tokens` tokens, kernels' own scratch included.

        sequences: of which the logits are wanted.
        """
        delta, attention = delta_net_shape(config), attention_shape(config)
        width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        per_token = 3 * config.hidden_size
        per_token += max(delta.channels, width) + delta.channels + delta.values + 2 * delta.value_heads
        per_token += 3 * width + 2 * kv_width
        per_token += config.num_experts + 3 * config.num_experts_per_tok + 2
        if tokens <= FEW:  # results of experts kept apart, as they land in any order
            per_token += (config.num_experts_per_tok + 1) * config.hidden_size
        # Kernels: the two planes of an input (a bit over half a float a value), gathered once more for up to two
        # chunks of pairs, whose hidden rows and their planes stand beside them; the recurrence's keys and queries of
        # 256 tokens.
        widest = max(config.hidden_size, width, delta.values, config.shared_expert_intermediate_size)
        hidden_rows = max(config.moe_intermediate_size, config.shared_expert_intermediate_size)
        per_token += 2 * widest + 2 * config.hidden_size + 4 * hidden_rows
        recurrence = 2 * delta.value_heads * (delta.key_dim + 4) * min(tokens, 256)
        return 4 * (per_token * tokens + recurrence + sequences * config.vocab_size)

    def _foresight(self, layer: int, x: F32) -> Foresight | None:
        """What `layer` would ask for if the layers before it added nothing to the stream x [tokens, hidden]."""
        if x.shape[0] > FEW or layer == len(self._ffns) or not isinstance(self._ffns[layer], SparseMoe):
            return None
        return functools.partial(self._foresee, layer, x)

    def _foresee(self, layer: int, x: F32) -> tuple[int, list[int]]:
        ffn = self._ffns[layer]
        assert isinstance(ffn, SparseMoe)
        h = self._work.get("foreseen_input", x.shape)
        self._ops.rms_norm(x, self._norms[layer][1], self.config.rms_norm_eps, h)
        return ffn.foresee(h, self._work)

    def _logits(self, h: F32) -> F32:
        logits: F32 = self._work.get("logits", (h.shape[0], self.config.vocab_size))
        if len(h):
            self._ops.linear(h, self._head, [logits], True)
        return logits


def attention_shape(config: Qwen35Config) -> AttentionShape:
    """Sizes of every full-attention layer."""
    return AttentionShape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
    )


def delta_net_shape(config: Qwen35Config) -> DeltaNetShape:
    """Sizes of every linear-attention layer."""
    return DeltaNetShape(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        config.rms_norm_eps,
    )


def _ffn(
    config: Qwen35Config, weights: Weights, layer: int, per_token: int, ops: Any
) -> SparseMoe | DenseMlp:
    prefix = f"layers.{layer}.mlp."
    if layer in config.dense_layers:
        assert config.intermediate_size is not None  # the configuration's own check
        return DenseMlp(weights, prefix, config.hidden_size, config.intermediate_size, ops)
    shape = MoeShape(
        config.hidden_size,
        config.num_experts,
        per_token,
        config.moe_intermediate_size,
        config.shared_expert_intermediate_size,
    )
    return SparseMoe(weights, prefix, layer, shape, ops)
