"""The native CPU backend: one object that holds the thread pool, the chosen instruction set and all operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashmoe import _native
from flashmoe.bundle.codecs import U8, DenseCodec, FfnLayout, TileCodec
from flashmoe.errors import ConfigError
from flashmoe.kernels.ops import F32

ACTIVATIONS = ("int8", "f32")


@dataclass(frozen=True)
class FfnWeights:
    """One feed-forward record in memory: its native layout, where it starts, and the array that owns it."""

    layout: _native.FfnLayout
    address: int
    owner: Any
    group: int


def choose_isa() -> tuple[str, str]:
    """(instruction set, why): the best of this machine, lowered by FLASHMOE_CPU.  Raises ConfigError."""
    try:
        return _native.choose_isa()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def explain() -> dict[str, Any]:
    """What `flashmoe doctor` prints: the chosen instruction set, the reason and all supported ones."""
    isa, reason = choose_isa()
    return {"isa": isa, "reason": reason, "supported": _native.supported_isas()}


class CpuOps:
    """All operations of kernels/ops.py on the CPU.

    activations "int8" quantises the input of every matrix product per group; "f32" is the accuracy oracle.
    Results do not depend on the number of threads, on the instruction set or on how many tokens share a call.
    Not thread-safe: one object per inference thread.
    """

    def __init__(self, threads: int, activations: str = "int8", isa: str | None = None) -> None:
        if activations not in ACTIVATIONS:
            raise ConfigError(f"unknown activations {activations!r}: choose one of {', '.join(ACTIVATIONS)}")
        if not 1 <= threads <= 1024:
            raise ConfigError(f"--threads must be between 1 and 1024, got {threads}")
        self.isa = isa if isa is not None else choose_isa()[0]
        self.activations = activations
        self.threads = threads
        self._pool = _native.ThreadPool(threads)
        quant = _native.QuantOps(self._pool, self.isa, activations == "int8")
        floats = _native.FloatOps(self._pool, self.isa)
        self._quant, self._floats = quant, floats
        # Bound methods: a decode step makes some 400 calls, and a wrapper of each would cost 0.1 ms a token.
        self.linear, self.embed, self.sigmoid = quant.linear, quant.embed, quant.sigmoid
        self.logits, self.head_linear = quant.logits, quant.head_linear
        self.prepare, self.expert_ffn, self.combine = quant.prepare, quant.expert_ffn, quant.combine
        self.routed_ffn = quant.routed_ffn
        self.rms_norm, self.add_rms_norm = floats.rms_norm, floats.add_rms_norm
        self.gated_rms_norm = floats.gated_rms_norm
        self.causal_conv1d, self.gated_delta_rule = floats.causal_conv1d, floats.gated_delta_rule
        self.attention_prepare, self.attention = floats.attention_prepare, floats.attention
        self.mla_prepare, self.mla_attention = floats.mla_prepare, floats.mla_attention
        self.route, self.route_grouped = floats.route, floats.route_grouped

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the kernels' own grow-only scratch memory."""
        return self._quant.scratch_nbytes + self._floats.scratch_nbytes

    def weight(
        self, data: U8, codec: TileCodec | DenseCodec, rows: int, cols: int, bias: F32 | None = None
    ) -> _native.Weight:
        """A matrix [rows, cols] over its bytes in memory; the arrays stay alive as long as the weight."""
        if isinstance(codec, TileCodec):
            f16, table = codec.scale_dtype == "f16", _table(codec)
            return _native.tile_weight(data, rows, cols, codec.bits, codec.group, f16, table, bias)
        return _native.dense_weight(data, rows, cols, codec.dtype, bias)

    def ffn_layout(self, layout: FfnLayout) -> _native.FfnLayout:
        """The native form of a record's layout."""
        gate_up, down = layout.gate_up, layout.down
        return _native.ffn_layout(
            layout.hidden,
            layout.intermediate,
            (gate_up.bits, gate_up.group),
            (down.bits, down.group),
            gate_up.scale_dtype == "f16",
            down.scale_dtype == "f16",
            _table(gate_up),
            _table(down),
            0.0 if layout.glu is None else layout.glu.alpha,
            0.0 if layout.glu is None else layout.glu.limit,
            layout.biased,
        )

    def ffn_weights(self, data: U8, layout: FfnLayout) -> FfnWeights:
        """A record in memory, ready for expert_ffn."""
        return FfnWeights(self.ffn_layout(layout), data.ctypes.data, data, layout.gate_up.group)

    def token_input(self) -> _native.TokenInput:
        """Room for the prepared activations of one group size."""
        return _native.TokenInput()

    def read_bandwidth(self, data: U8) -> float:
        """Bytes per second at which all threads together read `data`; best of three passes."""
        return self._quant.read_bandwidth(data)

    def int8_peak(self) -> float:
        """Integer multiply-adds per second that all threads together reach between registers; best of three passes."""
        return self._quant.int8_peak()


def _table(codec: TileCodec) -> list[int] | None:
    return None if codec.table is None else list(codec.table)
