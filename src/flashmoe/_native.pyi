"""Types of the native core (native/python); arguments are checked there and raise ValueError."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]

def supported_isas() -> list[str]: ...
def choose_isa() -> tuple[str, str]: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class Weight:
    rows: int
    cols: int

class FfnLayout:
    nbytes: int
    down_offset: int

class TokenInput:
    def __init__(self) -> None: ...
    @property
    def nbytes(self) -> int: ...

def tile_weight(
    tiles: U8,
    rows: int,
    cols: int,
    bits: int,
    group: int,
    f16_scales: bool,
    table: Sequence[int] | None = None,
    bias: F32 | None = None,
) -> Weight: ...
def dense_weight(data: NDArray[Any], rows: int, cols: int, type: str, bias: F32 | None = None) -> Weight: ...
def ffn_layout(
    hidden: int,
    intermediate: int,
    gate_up: tuple[int, int],
    down: tuple[int, int],
    f16_gate_up: bool,
    f16_down: bool,
    gate_up_table: Sequence[int] | None = None,
    down_table: Sequence[int] | None = None,
    glu_alpha: float = 0.0,
    glu_limit: float = 0.0,
    biased: bool = False,
) -> FfnLayout: ...

class QuantOps:
    def __init__(self, pool: ThreadPool, isa: str, int8: bool) -> None: ...
    def linear(
        self,
        x: F32,
        weights: Sequence[Weight],
        outs: Sequence[F32],
        precise: bool = False,
        gated: bool = False,
    ) -> None: ...
    def logits(self, x: F32, weight: Weight, out: F32) -> None: ...
    def head_linear(self, x: F32, weight: Weight, out: F32, precise: bool = False) -> None: ...
    def embed(self, table: Weight, ids: I32, out: F32) -> None: ...
    def prepare(self, input: TokenInput, x: F32, group: int) -> None: ...
    def expert_ffn(
        self,
        input: TokenInput,
        layout: FfnLayout,
        addresses: Sequence[int],
        offsets: Sequence[int],
        tokens: I32,
        rows: I32,
        out: F32,
        weights: F32 | None = None,
        shared: tuple[TokenInput, FfnLayout, int] | None = None,
    ) -> None: ...
    def routed_ffn(
        self,
        input: TokenInput,
        layout: FfnLayout,
        addresses: U64,
        chosen: I32,
        weights: F32,
        out: F32,
        most_pairs: int,
        shared: tuple[TokenInput, FfnLayout, int] | None = None,
        shared_weights: F32 | None = None,
    ) -> int: ...
    def combine(self, y: F32, rows: I32, weights: F32, out: F32) -> None: ...
    def sigmoid(self, x: F32, out: F32) -> None: ...
    def read_bandwidth(self, data: U8) -> float: ...
    def int8_peak(self) -> float: ...
    @property
    def scratch_nbytes(self) -> int: ...

class FloatOps:
    def __init__(self, pool: ThreadPool, isa: str) -> None: ...
    def rms_norm(self, x: F32, w: F32, eps: float, out: F32) -> None: ...
    def add_rms_norm(self, x: F32, delta: F32, w: F32, eps: float, out: F32) -> None: ...
    def gated_rms_norm(self, o: F32, z: F32, w: F32, eps: float, out: F32) -> None: ...
    def causal_conv1d(self, u: F32, w: F32, states: Sequence[F32], ends: Sequence[int], out: F32) -> None: ...
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
    ) -> None: ...
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
        keys: NDArray[Any],
        values: NDArray[Any],
    ) -> None: ...
    def attention(
        self,
        q: F32,
        keys: NDArray[Any],
        values: NDArray[Any],
        position: int,
        q_gate: F32 | None,
        out: F32,
        window: int = 0,
        sinks: F32 | None = None,
    ) -> None: ...
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
        cache: NDArray[Any],
    ) -> None: ...
    def mla_attention(self, q: F32, cache: NDArray[Any], position: int, scale: float, out: F32) -> None: ...
    def route(self, logits: F32, k: int, chosen: I32, weights: F32, renormalise: bool = True) -> None: ...
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
    ) -> None: ...
    @property
    def scratch_nbytes(self) -> int: ...

class AlignedBuffer:
    def __init__(self, nbytes: int, huge: bool) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def array(self) -> U8: ...

class Reader:
    def __init__(self, paths: list[str], direct: str, engine: str, queue_depth: int) -> None: ...
    def submit(
        self,
        file: int,
        offset: int,
        nbytes: int,
        buffer: AlignedBuffer,
        buffer_offset: int,
        tag: int,
        prefetch: bool = False,
    ) -> None: ...
    def wait(self) -> list[tuple[int, str]]: ...
    def poll(self) -> list[tuple[int, str]]: ...
    def withdraw(self) -> list[int]: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def direct_reason(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def engine_reason(self) -> str: ...
    def stats(self) -> tuple[int, int, float, int]: ...

class Sampler:
    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        presence_penalty: float,
        frequency_penalty: float,
        repetition_penalty: float,
        seed: int,
    ) -> None: ...
    def observe_prompt(self, ids: I32) -> None: ...
    def sample(self, logits: F32, allowed: NDArray[np.uint32] | None = None) -> int: ...
    @property
    def probability(self) -> float: ...

def top_logprobs(logits: F32, count: int) -> tuple[float, list[int], list[float]]: ...
