"""Decode and prefill speed of a bundle, alternating with the bounds and with a peer.

Decode is bound by memory: the bytes that a token must read, over the bandwidth at which the same threads read
memory.  Prefill is bound by the integer products: their multiply-adds, over the rate at which the same threads
multiply between registers.  On a shared machine memory gives 33 GB/s in one second and 60 in the next, and the best
burst is not what a second of decoding could have had: it is measured after every tenth of a second, in time that does
not count.  The integer peak is measured several times before and after a prompt, and the median counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import inf
from statistics import median, quantiles
from typing import Any

import numpy as np

from flashmoe.bench.peer import Peer
from flashmoe.engine.workbench import Workbench

_BOUND_RUNS = 5  # before a prompt and as many after it
_PIECE_SECONDS = 0.1  # of decoding between two readings of the memory


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: prompts and contexts in tokens, `tokens` decoded ones at each context."""

    prompts: list[int] = field(default_factory=lambda: [128, 512, 2048])
    contexts: list[int] = field(default_factory=lambda: [0])
    tokens: int = 32
    repeats: int = 5


@dataclass
class Series:
    """One thing measured in every repetition.  rate: bytes or multiply-adds per second; bound: what was possible."""

    name: str
    kind: str  # "decode" or "prefill"
    work: int  # bytes or multiply-adds a token
    tokens: int
    intensity: float  # multiply-adds a byte
    speeds: list[float] = field(default_factory=list)  # tokens per second
    bounds: list[float] = field(default_factory=list)  # bytes or multiply-adds per second
    peer: list[float] = field(default_factory=list)
    bytes_read: int = 0

    def report(self) -> dict[str, Any]:
        """Medians and quartiles; JSON values."""
        shares = [speed * self.work / bound for speed, bound in zip(self.speeds, self.bounds, strict=True)]
        report = {
            "name": self.name,
            "kind": self.kind,
            "tok_s": spread(self.speeds),
            "rate": median(self.speeds) * self.work,
            "bound_rate": median(self.bounds),
            "bound_tok_s": median(self.bounds) / self.work,
            "share_of_bound": spread(shares),
            "work_per_token": self.work,
            "intensity": self.intensity,
            "drive_bytes_read": self.bytes_read,
        }
        if self.peer:
            ratios = [ours / theirs for ours, theirs in zip(self.speeds, self.peer, strict=True)]
            report |= {"peer_tok_s": spread(self.peer), "ratio_to_peer": spread(ratios)}
        return report


def measure(
    bench: Workbench,
    options: BenchOptions,
    peer: Peer | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One report a series; `note` hears what is being measured.  Raises FlashmoeError subclasses."""
    bench.warm()
    series = list(_series(bench, options))
    for one in series:  # the first pass of each touches pages and grows buffers
        note(f"warming up: {one.name}")
        _run(bench, one, min(options.tokens, 4))
    for repeat in range(options.repeats):
        bench.touch()  # the peer warms itself up before each of its measurements
        for one in series:
            note(f"{one.name}, {repeat + 1} of {options.repeats}")
            _measure_once(bench, one, options.tokens)
        if peer is not None:
            note(f"llama.cpp, {repeat + 1} of {options.repeats}")
            threads = bench.engine._parts.ops.threads
            theirs = peer.run(options.prompts, options.tokens, options.contexts, threads)
            for one in series:
                one.peer.append(theirs[one.name])
    return [one.report() for one in series]


def profile(bench: Workbench, tokens: int) -> dict[str, Any]:
    """Where a decoded token's time goes: seconds in each native operation, and the share outside of all."""
    bench.warm()
    bench.touch()
    bench.fill_context(0)
    _decode(bench, _ids(bench, 4))
    with bench.timed_operations() as seconds:
        _, total = _decode(bench, _ids(bench, tokens))
    native = {name: value / tokens for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {
        "seconds_per_token": total / tokens,
        "operations": native,
        "python_share": 1.0 - sum(native.values()) * tokens / total,
    }


def _series(bench: Workbench, options: BenchOptions) -> Iterator[Series]:
    each, head = bench.multiply_adds()
    for context in options.contexts:
        nbytes = bench.step_nbytes(context)
        yield Series(f"decode at {context}", "decode", nbytes, context, (each + head) / nbytes)
    for tokens in options.prompts:
        work = each + head // tokens  # logits of the last position only
        # At most every weight once: the intensity of a prompt that meets all experts.
        nbytes = bench.engine.plan.slots_nbytes + bench.step_nbytes(0)
        yield Series(f"prefill {tokens}", "prefill", work, tokens, work * tokens / nbytes)


def _measure_once(bench: Workbench, series: Series, tokens: int) -> None:
    read = bench.bytes_read()
    if series.kind == "decode":
        speed, bound = _decode_beside_memory(bench, series.tokens, tokens)
    else:
        rates = [bench.int8_peak() for _ in range(_BOUND_RUNS)]
        speed = _prompt(bench, series.tokens)
        bound = median([*rates, *(bench.int8_peak() for _ in range(_BOUND_RUNS))])
    series.speeds.append(speed)
    series.bounds.append(bound)
    series.bytes_read += bench.bytes_read() - read


def _run(bench: Workbench, series: Series, tokens: int) -> None:
    if series.kind == "decode":
        bench.fill_context(series.tokens)
        _decode(bench, _ids(bench, tokens))
    else:
        _prompt(bench, series.tokens)


def _prompt(bench: Workbench, tokens: int) -> float:
    """Tokens per second."""
    bench.engine.start()
    ids = _ids(bench, tokens)
    began = time.perf_counter()
    bench.engine.feed(ids, "last")
    return tokens / (time.perf_counter() - began)


def _decode_beside_memory(bench: Workbench, context: int, tokens: int) -> tuple[float, float]:
    """Tokens per second, and the bytes per second that memory gave meanwhile."""
    bench.fill_context(context)
    ids = _ids(bench, tokens + 1)
    _decode(bench, ids[:1])
    taken = seconds_per_byte = 0.0
    done, before = 1, bench.read_bandwidth()
    while done <= tokens:
        count, seconds = _decode(bench, ids[done:], _PIECE_SECONDS)
        after = bench.read_bandwidth()
        taken += seconds
        seconds_per_byte += count * 2 / (before + after)
        done, before = done + count, after
    return tokens / taken, tokens / seconds_per_byte


def _decode(bench: Workbench, ids: list[int], limit: float = inf) -> tuple[int, float]:
    """How many were decoded until `limit` seconds had passed, at least one, and the seconds."""
    began, count, seconds = time.perf_counter(), 0, 0.0
    while count < len(ids) and seconds < limit:
        bench.engine.feed([ids[count]], "last")
        count, seconds = count + 1, time.perf_counter() - began
    return count, seconds


def _ids(bench: Workbench, count: int) -> list[int]:
    vocab = bench.engine._parts.model.config.vocab_size
    ids: list[int] = np.random.default_rng(count).integers(0, vocab, count).tolist()
    return ids


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of a single value, that value."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "low": low, "high": high}


def options_of(options: BenchOptions) -> dict[str, Any]:
    """As JSON values."""
    return asdict(options)
