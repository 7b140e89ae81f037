"""The decoder that all families share: a residual stream through token mixers and feed-forward blocks.

x += mixer(norm(x)); x += ffn(norm(x)) in each layer; then a last norm and the output head.  What the blocks are is
said by an Architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashmoe.models.architecture import Architecture
from flashmoe.nn.blocks import Experts, Ffn, Foresight, LayerState, Mixer
from flashmoe.nn.moe import FEW, SparseMoe
from flashmoe.nn.rotary import RotaryTables
from flashmoe.nn.weights import F32, I32, Weights
from flashmoe.nn.workspace import Workspace


class SequenceState:
    """All that one sequence carries: its length and every layer's cache or recurrent state."""

    def __init__(self, layers: Sequence[LayerState]) -> None:
        self.layers = list(layers)
        self.position = 0

    def arrays(self) -> list[NDArray[Any]]:
        """Views of all that the sequence's `position` tokens have left: copies of them are a snapshot of it."""
        return [array for layer in self.layers for array in layer.arrays(self.position)]

    def growing(self) -> list[bool]:
        """Of each array: LayerState.grows."""
        return [layer.grows for layer in self.layers for _ in layer.arrays(self.position)]

    def restore(self, position: int, arrays: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Become the sequence that a snapshot (copies of arrays() at `position`) was taken of.

        Each array may come in pieces, one after the other along its second axis.
        """
        self.position = position
        for mine, pieces in zip(self.arrays(), arrays, strict=True):
            begin = 0
            for piece in pieces:
                end = begin + piece.shape[1]
                mine[:, begin:end] = piece
                begin = end

    def clear(self) -> None:
        """Start a new sequence in the same memory."""
        self.position = 0
        for layer in self.layers:
            layer.clear()


BatchPart = tuple[SequenceState, slice]


class Decoder:
    """The forward pass.  `embed` turns token ids [tokens] int32 into hidden rows: `embed(ids, out)`.

    Not thread-safe; one call at a time.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        ops: Any,
        *,
        embed: Callable[[I32, F32], None],
        context: int,
    ) -> None:
        """Raises BundleError when a weight is missing or of another size than the architecture asks for."""
        config = self.config = architecture.config
        self.architecture, self.context = architecture, context
        self._ops, self._embed, self._work = ops, embed, Workspace()
        rotary = RotaryTables(context)
        self._mixers: list[Mixer] = []
        self._ffns: list[Ffn] = []
        self._norms: list[tuple[F32, F32]] = []
        for i, layer in enumerate(architecture.layers):
            prefix = f"layers.{i}."
            self._mixers.append(layer.mixer.build(weights, prefix + layer.mixer.prefix, rotary, ops))
            self._ffns.append(layer.ffn.build(weights, prefix + "mlp.", i, ops))
            names = ("input_layernorm", "post_attention_layernorm")
            first, second = (weights.vector(prefix + name, config.hidden_size) for name in names)
            self._norms.append((first, second))
        self._final_norm = weights.vector("norm", config.hidden_size)
        head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._head = weights.matrix(head, config.vocab_size, config.hidden_size)

    def new_state(self, kv_dtype: DTypeLike) -> SequenceState:
        """An empty sequence of at most `context` tokens."""
        return SequenceState(
            [layer.mixer.new_state(self.context, kv_dtype) for layer in self.architecture.layers]
        )

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
            mixer(h, [(state.layers[i], state.position, own) for state, own in parts], work, delta)
            ops.add_rms_norm(x, delta, second, eps, h)
            self._ffns[i](h, experts, work, delta, self._foresight(i + 1, x))
        ops.add_rms_norm(x, delta, self._final_norm, eps, h)
        for state, own in parts:
            state.position += own.stop - own.start
        return self._logits(h[rows])

    def _foresight(self, layer: int, x: F32) -> Foresight | None:
        """What `layer` and those after it would ask for if nothing else were added to the stream x [tokens, hidden]."""
        if x.shape[0] > FEW or layer == len(self._ffns) or not isinstance(self._ffns[layer], SparseMoe):
            return None
        return functools.partial(self._foresee, layer, x)

    def _foresee(self, layer: int, x: F32, added: F32 | None) -> Iterator[tuple[int, I32]]:
        if added is not None:
            stream = self._work.get("foreseen_stream", x.shape)
            x = np.add(x, added, out=stream)
        h = self._work.get("foreseen_input", x.shape)
        for ffn, (_, norm) in zip(self._ffns[layer:], self._norms[layer:], strict=True):
            if not isinstance(ffn, SparseMoe):
                return
            self._ops.rms_norm(x, norm, self.config.rms_norm_eps, h)
            yield ffn.foresee(h, self._work)

    def _logits(self, h: F32) -> F32:
        logits: F32 = self._work.get("logits", (h.shape[0], self.config.vocab_size))
        if len(h):
            self._ops.logits(h, self._head, logits)
        return logits
