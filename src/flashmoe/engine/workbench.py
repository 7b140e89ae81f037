"""What measurements need of an engine: everything in memory, a context without its prompt, bytes and operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.bundle.codecs import FfnLayout
from flashmoe.engine.bound import measure_memory
from flashmoe.engine.engine import Engine
from flashmoe.errors import ConfigError
from flashmoe.kernels.kv_cache import POSITIONS, cache_scales

OPERATIONS = [
    "embed",
    "linear",
    "prepare",
    "expert_ffn",
    "routed_ffn",
    "combine",
    "sigmoid",
    "rms_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "causal_conv1d",
    "gated_delta_rule",
    "attention_prepare",
    "attention",
    "head_linear",
    "logits",
    "mla_prepare",
    "mla_attention",
    "route",
    "route_grouped",
]
_FILL = 256  # blocks of positions filled with random values at a time


class Workbench:
    """Measures an engine from inside.  Not thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._parts = engine._parts

    @property
    def resident(self) -> bool:
        """True when every expert has a slot."""
        return self.engine.plan.slots >= self.engine.plan.experts

    def warm(self) -> None:
        """Read experts into the slots, as many as there are, the same share of each layer."""
        layers = self._parts.bundle.expert_layers
        for layer in layers:
            share = min(layer.count, self.engine.plan.slots // len(layers))
            self._parts.cache.fill(layer.layer, range(share))

    def touch(self) -> None:
        """Let all threads read every weight and slot once, as those of a model in use have been.

        A virtual machine whose host shadows its page tables takes a fault for each page's first use, and once more
        after another process has run: prompts of 128 tokens that followed llama.cpp came out at a third of their speed.
        """
        ops = self._parts.ops
        for data in (self._parts.weights.data, self._parts.cache._arena.buffer.array()):
            ops.read_bandwidth(data)

    def bytes_read(self) -> int:
        """Bytes of experts read from the drive so far."""
        return self._parts.cache.stats().bytes_read

    def read_bandwidth(self) -> float:
        """Bytes per second at which the engine's own threads read its weights."""
        return measure_memory(self._parts.ops, self._parts.weights.data)

    def int8_peak(self) -> float:
        """Multiply-adds per second of the engine's own threads between registers."""
        return self._parts.ops.int8_peak()

    def fill_context(self, tokens: int) -> None:
        """Begin a sequence that has `tokens` tokens already: random keys and values, zero recurrent states.

        The time of a further token depends on how many there are, not on what they are.  Raises ConfigError when
        the context is too short for it.
        """
        if tokens >= self.engine.plan.context:
            raise ConfigError(
                f"a context of {self.engine.plan.context} cannot hold {tokens} tokens and a new one"
            )
        self.engine.start()
        state, rng = self._parts.states[0], np.random.default_rng(0)
        for layer in state.layers:
            for cache in getattr(layer, "caches", ()):
                _fill(cache, tokens, rng)
        state.position = tokens

    def always_nbytes(self, sequences: int) -> int:
        """Bytes that one decoded token of each of so many sequences reads at least, apart from routed experts."""
        parts = self._parts
        routed = sum(self._per_token * layer.ffn.nbytes for layer in parts.bundle.expert_layers)
        states = parts.model.architecture.state_traffic()
        return parts.token_nbytes - routed + (sequences - 1) * states

    @property
    def _per_token(self) -> int:
        return self._parts.model.config.num_experts_per_tok

    def step_nbytes(self, context: int) -> int:
        """Bytes of weights, states, keys and values that one decoded token reads at least."""
        total = self._parts.token_nbytes
        for layer in self._parts.states[0].layers:
            total += getattr(layer, "position_nbytes", 0) * context
        return total

    def multiply_adds(self) -> tuple[int, int]:
        """Of quantised and dense matrices: (for each token, for a row of logits)."""
        bundle = self._parts.bundle
        head = "lm_head" if "lm_head" in bundle else "embed_tokens"
        each = 0
        for info in map(bundle.tensor, bundle.tensor_names()):
            if isinstance(info.codec, FfnLayout):
                each += 3 * info.codec.hidden * info.codec.intermediate
            elif info.name not in (head, "embed_tokens") and info.rows > 1 and info.cols > 64:
                each += info.rows * info.cols
        per_token = self._per_token
        for layer in bundle.expert_layers:
            each += per_token * 3 * layer.ffn.hidden * layer.ffn.intermediate
        info = bundle.tensor(head)
        return each, info.rows * info.cols

    @contextmanager
    def timed_operations(self) -> Iterator[dict[str, float]]:
        """Seconds spent inside each native operation, summed while the context lasts."""
        ops, seconds = self._parts.ops, dict[str, float]()
        originals = {name: getattr(ops, name) for name in OPERATIONS}
        try:
            for name, call in originals.items():
                setattr(ops, name, _timed(call, name, seconds))
            yield seconds
        finally:
            for name, call in originals.items():
                setattr(ops, name, call)

    @contextmanager
    def timed_head(self) -> Iterator[dict[str, float]]:
        """As timed_operations, of the output head as a whole: its seconds under "head"."""
        model, seconds = self._parts.model, {"head": 0.0}
        model._logits = _timed(model._logits, "head", seconds)  # type: ignore[method-assign]
        try:
            yield seconds
        finally:
            del model._logits


def _timed(call: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    return timed


def _fill(cache: NDArray[Any], tokens: int, rng: np.random.Generator) -> None:
    """Standard normal keys and values; int8: codes of their spread with all scales equal."""
    heads, _, block = cache.shape
    for begin in range(0, -(-tokens // POSITIONS), _FILL):
        blocks = cache[:, begin : min(begin + _FILL, -(-tokens // POSITIONS))]
        if cache.dtype == np.int8:
            _fill_codes(blocks, rng)
        else:
            blocks[...] = rng.standard_normal((heads, blocks.shape[1], block), np.float32)


def _fill_codes(blocks: NDArray[np.int8], rng: np.random.Generator) -> None:
    scales = cache_scales(blocks)
    blocks[...] = rng.integers(-127, 128, blocks.shape, np.int8)
    scales[...] = np.float32(1 / 64)
