"""What a decoder needs to know of its blocks: how they are built, and what they keep, read and compute.

A layer is a token mixer (attention, a recurrence) and a feed-forward block.  Each kind of either has one frozen
dataclass of sizes, its shape, which answers for the memory plan and the forecast and builds the block itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from numpy.typing import DTypeLike, NDArray

from flashmoe.nn.rotary import Rope, RotaryTables
from flashmoe.nn.weights import F32, I32, Weights
from flashmoe.nn.workspace import Workspace

# What the coming layers will probably choose, one after the other: (layer, experts [tokens, k], each token's most
# probable first; valid until the next layer).  Its argument is what of this layer's result is known already,
# [tokens, hidden], or None.
Foresight = Callable[[F32 | None], Iterator[tuple[int, I32]]]


class Experts(Protocol):
    """Whoever holds the routed experts: in memory, on a drive, on another device."""

    def run(
        self,
        layer: int,
        x: F32,
        chosen: I32,
        weights: F32,
        shared: Any,
        shared_weights: F32,
        out: F32,
        foresight: Foresight | None = None,
    ) -> None:
        """out[t] = shared_weights[t] * shared(x[t]) + sum over e of weights[t, e] * expert_e(x[t]); shared may be None.

        x, out: [tokens, hidden]; chosen, weights: [tokens, k]; shared_weights: [tokens].  The sum runs over the
        shared expert first and then over ascending expert numbers, whatever is in memory, so that the result
        never depends on it; nor does it on `foresight`, which may be asked while there is nothing else to do.
        Raises ReadError when an expert cannot be read.
        """


class LayerState(Protocol):
    """What a sequence carries from token to token in one layer.

    grows: its arrays grow along their second axis, in blocks of POSITIONS tokens (kernels/kv_cache.py), and no later
    token changes a full block.
    """

    grows: ClassVar[bool]

    def arrays(self, position: int) -> list[NDArray[Any]]:
        """Views of all that the sequence's first `position` tokens have left."""

    def clear(self) -> None:
        """Back to the state before the first token."""


# A sequence's share of a call: its state in the layer, its tokens before the call, and its rows.
Part = tuple[Any, int, slice]


class Mixer(Protocol):
    """One layer's token mixer; a call advances the states by the tokens it is given."""

    def __call__(self, x: F32, parts: Sequence[Part], work: Workspace, out: F32) -> None:
        """x, out: [tokens, hidden], of one sequence after the other."""


class Ffn(Protocol):
    """One layer's feed-forward block."""

    def __call__(
        self, x: F32, experts: Experts, work: Workspace, out: F32, foresight: Foresight | None = None
    ) -> None:
        """x, out: [tokens, hidden]."""


class MixerShape:
    """Sizes of a mixer, a base of frozen dataclasses.  What a mixer has none of need not be said."""

    prefix: ClassVar[str]  # what stands before its tensors' names within a layer, e.g. "self_attn."

    def build(self, weights: Weights, prefix: str, rotary: RotaryTables, ops: Any) -> Mixer:
        """The block; raises BundleError when a tensor is missing or of another size."""
        raise NotImplementedError

    def new_state(self, context: int, kv_dtype: DTypeLike) -> LayerState:
        """An empty sequence's state of at most `context` tokens."""
        raise NotImplementedError

    def state_nbytes(self, context: int, kv_dtype: DTypeLike) -> int:
        """Bytes of such a state when the context is full."""
        raise NotImplementedError

    def float_work(self) -> tuple[int, int]:
        """Float multiply-adds of a token: (whatever its position, for each position before it)."""
        raise NotImplementedError

    def buffers(self) -> Mapping[str, int]:
        """Floats a token of each array that it takes from the workspace."""
        raise NotImplementedError

    def widest(self) -> int:
        """Values of its widest matrix input beside the hidden row."""
        raise NotImplementedError

    def ropes(self) -> tuple[Rope, ...]:
        """The rotary positions that it needs."""
        return ()

    def kernel_nbytes(self, context: int) -> int:
        """Bytes that its kernels need once for all layers, in proportion to the context."""
        return 0

    def state_traffic(self) -> int:
        """Bytes of state that a token reads and writes whatever its position."""
        return 0

    def position_nbytes(self, kv_dtype: DTypeLike) -> int:
        """Bytes that a token reads of each position before it, scales of int8 ones aside."""
        return 0

    def scratch(self, tokens: int) -> int:
        """Floats of its kernels' own scratch memory in a call with so many tokens."""
        return 0


class FfnShape:
    """Sizes of a feed-forward block, a base of frozen dataclasses."""

    def build(self, weights: Weights, prefix: str, layer: int, ops: Any) -> Ffn:
        """The block; raises BundleError when a tensor is missing or of another size."""
        raise NotImplementedError

    def widest(self) -> int:
        """Values of its widest matrix input beside the hidden row."""
        raise NotImplementedError

    def hidden_rows(self) -> int:
        """Values between the products, of one token in the widest of its records."""
        raise NotImplementedError

    def workspace(self, tokens: int) -> int:
        """Floats a token that a call with so many tokens takes from the workspace and keeps apart."""
        return 0
