"""Which blocks a model is made of, layer by layer, and what they add up to: memory, traffic, arithmetic.

No weights and no kernels: the memory plan and the forecast ask this before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from flashmoe.models.config import ModelConfig
from flashmoe.nn.blocks import FfnShape, MixerShape
from flashmoe.nn.rotary import RotaryTable


@dataclass(frozen=True)
class Layer:
    """One layer: its token mixer and its feed-forward block."""

    mixer: MixerShape
    ffn: FfnShape


@dataclass(frozen=True)
class Architecture:
    """A decoder's sizes and layers.  Sizes in bytes unless said."""

    config: ModelConfig
    layers: Sequence[Layer]

    @property
    def attention_layers(self) -> int:
        """Layers that keep keys and values of every position; the others are recurrent."""
        return sum(layer.mixer.position_nbytes(np.float16) > 0 for layer in self.layers)

    def state_nbytes(self, context: int, kv_dtype: DTypeLike, sequences: int = 1) -> int:
        """What grows with the context when it is full: states, rotary tables, the kernels' partial results."""
        each = sum(layer.mixer.state_nbytes(context, kv_dtype) for layer in self.layers)
        ropes = {rope for layer in self.layers for rope in layer.mixer.ropes()}
        shared = sum(RotaryTable.nbytes_of(context, rope.rotated) for rope in ropes)
        return sequences * each + shared + max(layer.mixer.kernel_nbytes(context) for layer in self.layers)

    def state_traffic(self) -> int:
        """State that one token reads and writes, short of the KV cache (which grows with the text)."""
        return sum(layer.mixer.state_traffic() for layer in self.layers)

    def position_nbytes(self, kv_dtype: DTypeLike) -> int:
        """Keys and values that a token reads of each position before it, scales of int8 ones aside."""
        return sum(layer.mixer.position_nbytes(kv_dtype) for layer in self.layers)

    def float_work(self) -> tuple[int, int]:
        """Float multiply-adds of a token: (in the recurrences, in attention for each position before it)."""
        works = [layer.mixer.float_work() for layer in self.layers]
        return sum(fixed for fixed, _ in works), sum(each for _, each in works)

    def workspace_nbytes(self, tokens: int, sequences: int = 1) -> int:
        """Upper bound of the scratch memory of a call with `tokens` tokens, kernels' own scratch included.

        sequences: of which the logits are wanted.
        """
        mixers = {layer.mixer for layer in self.layers}
        ffns = {layer.ffn for layer in self.layers}
        buffers: dict[str, int] = {}
        for mixer in mixers:
            for name, size in mixer.buffers().items():
                buffers[name] = max(buffers.get(name, 0), size)
        hidden = self.config.hidden_size
        per_token = 3 * hidden + sum(buffers.values()) + max(ffn.workspace(tokens) for ffn in ffns)
        # Kernels: the two planes of an input (a bit over half a float a value), gathered once more for up to two
        # chunks of pairs, whose hidden rows and their planes stand beside them.
        widest = max(hidden, *(m.widest() for m in mixers), *(f.widest() for f in ffns))
        per_token += 2 * widest + 2 * hidden + 4 * max(ffn.hidden_rows() for ffn in ffns)
        scratch = max(mixer.scratch(tokens) for mixer in mixers)
        return 4 * (per_token * tokens + scratch + sequences * self.config.vocab_size)
