"""Decode and prefill of a model that does not fit: speed beside its bound at several memory budgets.

Every budget runs in a process of its own, so that its peak memory is its own.  All slots are filled before anything is
measured: a read into memory that was never touched waits for the system to find and clear it.

Bound of decode: the bytes that were missed, at the rate that the drive gave while it was busy in this very run, or the
weights at the bandwidth that the memory had every few steps of it, whichever takes longer.  Bound of a prompt: what it
read at the drive's rate, or the time inside the kernels.

Reachable in decode, below that bound: a token's first layer is known to nobody before the token is, so the head and
that layer's mixer overlap with no read; and one thread does all that is not waiting, kernels and Python, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe import env
from flashmoe.bench.process import run_module, serve
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.workbench import Workbench

# Steps between two measurements of the memory: a shared machine's can double its speed within seconds.
_PROBE_STEPS = 4


@dataclass(frozen=True)
class StreamOptions:
    """What one process measures; tokens are drawn from `seed`, so every budget processes the same ones."""

    bundle: str
    memory_bytes: int | None
    warm: int = 16  # decoded before anything is measured
    tokens: int = 32
    prompt: int = 0
    lookahead: str = "auto"
    experts_per_token: int | None = None
    expert_slots: int | None = (
        None  # instead of as many as the budget holds: for models that any budget holds
    )
    parallel: int = 1  # sequences that are decoded together; warm and tokens count for each
    seed: int = 1


def measure_in_process(options: StreamOptions) -> dict[str, Any]:
    """Measure in a fresh interpreter.  Raises FlashmoeError with the one line that the process ended with."""
    return run_module("flashmoe.bench.stream", asdict(options))


def measure(options: StreamOptions) -> dict[str, Any]:
    """Open the bundle, decode, process a prompt and decode again; JSON values."""
    engine_options = EngineOptions(
        options.memory_bytes,
        context=max(4096, options.prompt + options.warm + 2 * options.tokens),
        lookahead=options.lookahead,
        experts_per_token=options.experts_per_token,
        expert_slots=options.expert_slots,
        sequences=options.parallel,
    )
    with Engine.open(Path(options.bundle), engine_options) as engine:
        bench, plan = Workbench(engine), engine.plan
        rng = np.random.default_rng(options.seed)
        vocab = engine._parts.model.config.vocab_size
        steps, width = options.warm + 2 * options.tokens, options.parallel
        ids = rng.integers(0, vocab, (steps, width)).tolist()
        prompt: list[int] = rng.integers(0, vocab, options.prompt).tolist()
        digest = xxhash.xxh3_64()
        for state in engine.states:
            state.clear()
        bench.warm()
        bench.touch()
        _steps(engine, ids[: options.warm], digest)
        report: dict[str, Any] = {
            "memory_bytes": plan.budget_nbytes,
            "slots": plan.slots,
            "experts": plan.experts,
            "drive_probe": engine._parts.drive_bandwidth
            if plan.experts
            else None,  # nothing to read: infinite
            "decode": _decode(bench, ids[options.warm : options.warm + options.tokens], digest),
        }
        if options.prompt:
            report["prefill"] = _prefill(bench, prompt, digest)
            report["decode_after"] = _decode(bench, ids[options.warm + options.tokens :], digest)
        report["peak_memory_bytes"] = env.peak_memory()
        report["logits_xxh3"] = digest.hexdigest()
        return report


def _steps(engine: Engine, ids: list[list[int]], digest: Any) -> None:
    """Decode a token of every sequence in each step."""
    everybody = list(range(len(engine.states)))
    for tokens in ids:
        parts = [(state, [token]) for state, token in zip(engine.states, tokens, strict=True)]
        digest.update(engine.step(parts, everybody).data)


class _MemoryProbe:
    """Measures the memory's bandwidth during a run."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._byte_seconds: list[float] = []
        self.seconds = 0.0  # that measuring took

    def measure(self) -> None:
        began = time.perf_counter()
        self._byte_seconds.append(1 / self._bench.read_bandwidth())
        self.seconds += time.perf_counter() - began

    @property
    def byte_seconds(self) -> float:
        """Mean seconds a byte."""
        return sum(self._byte_seconds) / len(self._byte_seconds)


def _decode(bench: Workbench, ids: list[list[int]], digest: Any) -> dict[str, Any]:
    steps, width, probe = len(ids), len(ids[0]), _MemoryProbe(bench)

    def work() -> None:
        probe.measure()
        for begin in range(0, steps, _PROBE_STEPS):
            _steps(bench.engine, ids[begin : begin + _PROBE_STEPS], digest)
            probe.measure()

    with bench.timed_head() as timed:
        report = observed(bench, work, steps * width, probe)
    # What a step touches at least: all that is always needed, each sequence's state, and each distinct expert once.
    experts = report["experts_asked"] / steps
    nbytes = bench.always_nbytes(width) + experts * bench.engine.plan.record_nbytes
    bound = max(report["read_seconds"] / steps, nbytes * probe.byte_seconds)
    layers = bench.engine._parts.model.config.num_hidden_layers
    step = width / report["tok_s"]
    head = timed["head"]
    mixers = report["kernel_seconds"] - report["expert_seconds"] - head
    blind = (head + mixers / layers) / steps
    reachable = max(bound, report["read_seconds"] / steps + blind, step * (1 - report["stall_share"]))
    return report | {
        "memory_rate": 1 / probe.byte_seconds,
        "bound_tok_s": width / bound,
        "share_of_bound": bound / step,
        "reachable_tok_s": width / reachable,
        "share_of_reachable": reachable / step,
        "experts_per_layer": experts / layers,
        "layer_ms": {
            "total": 1e3 * step / layers,
            "compute": 1e3 * report["kernel_seconds"] / steps / layers,
            "read": 1e3 * report["read_seconds"] / steps / layers,
            "stall": 1e3 * report["stall_share"] * step / layers,
        },
    }


def _prefill(bench: Workbench, ids: list[int], digest: Any) -> dict[str, Any]:
    def work() -> None:
        bench.engine.start()
        digest.update(bench.engine.feed(ids, "last").data)

    report = observed(bench, work, len(ids))
    bound = max(report["read_seconds"], report["kernel_seconds"])
    return report | {"bound_tok_s": len(ids) / bound, "share_of_bound": report["tok_s"] * bound / len(ids)}


def observed(
    bench: Workbench, work: Callable[[], Any], tokens: int, probe: _MemoryProbe | None = None
) -> dict[str, Any]:
    """Run `work` and tell its speed and what the drive did meanwhile; the probe's own seconds do not count."""
    parts = bench.engine._parts
    before, reads = parts.cache.stats(), parts.reader.stats()
    with bench.timed_operations() as operations:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began - (probe.seconds if probe is not None else 0.0)
    done, now = parts.cache.stats().since(before), parts.reader.stats()
    busy, nbytes = now[2] - reads[2], now[1] - reads[1]
    rate = nbytes / busy if busy > 0 else 0.0
    total = done.total
    return {
        "tok_s": tokens / seconds,
        "hit_rate": total.hit_rate,
        "missed_bytes_per_token": done.missed_bytes / tokens,
        "wasted_share": done.wasted_bytes / done.bytes_read if done.bytes_read else 0.0,
        "drive_rate": rate,
        "drive_busy_share": busy / seconds,
        "read_seconds": done.missed_bytes / rate if rate else 0.0,
        "kernel_seconds": sum(operations.values()),
        "expert_seconds": operations.get("expert_ffn", 0.0) + operations.get("routed_ffn", 0.0),
        "experts_asked": total.hits + total.misses,
        "stall_share": total.stall_seconds / seconds,
        "queue_depth": done.queue_depth,
    }


if __name__ == "__main__":
    serve(lambda options: measure(StreamOptions(**options)))
