"""The engine: an opened bundle, one sequence, and token ids in and out.

What the outside may rely on is this class; text, templates and servers are built on top of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from flashmoe import env
from flashmoe.bundle.reader import Bundle
from flashmoe.engine import loading
from flashmoe.engine.bound import decode_bound
from flashmoe.engine.constraint import Constraint
from flashmoe.engine.memory import MemoryPlan
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.sampler import Sampler
from flashmoe.errors import PromptError
from flashmoe.kernels.cpu import CpuOps
from flashmoe.models.decoder import SequenceState
from flashmoe.nn.weights import F32
from flashmoe.store.cache import ExpertCache
from flashmoe.store.policies.registry import AUTO as DEFAULT_POLICY
from flashmoe.store.stats import CacheStats


@dataclass(frozen=True)
class EngineOptions:
    """How to run a bundle.

    memory_bytes: ceiling of the whole process, None for what can be spared (memory.auto_budget).
    context: longest sequence in tokens, None for the model's own or 8,192, whichever is shorter.
    experts_per_token: fewer (or more) than the model's own changes its output; None keeps it exact.
    activations: "int8" (fast) or "f32" (accuracy oracle).
    kv_cache: "f16", "int8" (docs/decisions/006) or "f32"; None is "f16", and "f32" with activations "f32".
    io: "auto", "direct" or "buffered".
    lookahead: "auto" reads likely experts of the next layers into idle time of the drive while that helps, "on"
    always, "off" never.
    sequences: how many can be processed side by side (1 to 16), each with its own context.
    prefix_cache_bytes: memory set apart for snapshots of sequences (engine/prefix_cache.py).
    verify_reads: compare resident tensors and expert records with their checksums as they are read.
    logit_rows: tokens of one feed() of which the logits are wanted; the memory plan counts them.
    experts_dirs: of a striped bundle, directories that are not where its links lead.
    usage_file: where uses of experts are remembered from run to run, for a warm start: "off", "auto" or a path.
    policy: which expert leaves when a slot is needed: auto, a name of store/policies/registry.py, or learned:FILE.
    record_trace: file that gets what the routers picked (docs/format.md, section 10) when the engine is closed.
    prefill_chunk, expert_slots: fix what the memory plan otherwise chooses; never change a result.
    """

    memory_bytes: int | None = None
    context: int | None = None
    threads: int | None = None
    experts_per_token: int | None = None
    activations: str = "int8"
    kv_cache: str | None = None
    io: str = "auto"
    prefill_chunk: int | None = None
    expert_slots: int | None = None
    verify_reads: bool = False
    sequences: int = 1
    prefix_cache_bytes: int = 0
    lookahead: str = "auto"
    logit_rows: int = 1
    experts_dirs: tuple[Path, ...] = ()
    usage_file: str | Path = "off"
    policy: str = DEFAULT_POLICY
    record_trace: Path | None = None


@dataclass
class _Timing:
    """Token counts and seconds of the last request, and the store's counters before it."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0


class Engine:
    """One model, one sequence at a time.  Not thread-safe.

    A context manager; close() frees the threads and the memory.
    """

    def __init__(self, parts: loading.Parts, options: EngineOptions) -> None:
        self._parts, self._options = parts, options
        self.bundle: Bundle = parts.bundle
        self.plan: MemoryPlan = parts.plan
        self.finish_reason: str | None = None
        self._closed = False
        self._timing = _Timing()
        self._prompt_store = self._decode_store = parts.cache.stats()
        self._decode_reads = parts.reader.stats()

    @classmethod
    def open(cls, path: Path | str, options: EngineOptions | None = None) -> Self:
        """Load a bundle.

        Raises BundleError, ConfigError, BudgetError or ReadError, each with one line that names the remedy.
        """
        options = options or EngineOptions()
        return cls(loading.load(Path(path), options), options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the I/O threads and close the files; memory goes with the object.  Harmless when repeated."""
        if not self._closed:
            self._closed = True
            self._parts.warming.end()
            self._parts.reader.close()
            if self._parts.recorder is not None:
                self._parts.recorder.close()

    def start(self) -> None:
        """Begin a new, empty sequence."""
        self._parts.states[0].clear()

    def feed(self, ids: list[int], logits_of: str = "all") -> F32:
        """Append tokens to the sequence; logits [rows, vocab] float32 of "all", the "last" or "none" of them.

        Raises PromptError when an id is not in the vocabulary or the context is full, ReadError when an expert
        cannot be read; after either, start() again.
        """
        self.check(ids)
        self._check_room(self._parts.states[0], len(ids))
        chunk = self.plan.prefill_chunk
        rows = []
        for begin in range(0, len(ids), chunk):
            part = np.array(ids[begin : begin + chunk], np.int32)
            wanted = logits_of if logits_of == "all" or begin + chunk >= len(ids) else "none"
            self._record([(self._parts.states[0], part.tolist())])
            with self._parts.warming.step():
                logits = self._parts.model.forward(part, self._parts.states[0], self._parts.experts, wanted)
            if wanted != "none" or begin + chunk >= len(ids):
                rows.append(logits.copy() if logits_of == "all" else logits)
        return np.concatenate(rows) if len(rows) > 1 else rows[0]

    @property
    def logit_rows(self) -> int:
        """How many tokens feed() may take at a time when the logits of all are wanted, within the memory plan."""
        return min(self._options.logit_rows, self.plan.prefill_chunk)

    @property
    def ops(self) -> CpuOps:
        """The backend: its instruction set and threads."""
        return self._parts.ops

    @property
    def token_nbytes(self) -> int:
        """Bytes of weights and state that one decoded token reads, wherever they are, short of its keys and values."""
        return self._parts.token_nbytes

    @property
    def states(self) -> list[SequenceState]:
        """The sequences' states; the first is the one that feed() advances."""
        return self._parts.states

    def step(self, parts: Sequence[tuple[SequenceState, Sequence[int]]], wanted: list[int]) -> F32:
        """Append tokens to several distinct sequences in one pass over the weights.

        Logits float32 [len(wanted), vocab] of the last token of each parts[i], i in `wanted`; valid until the next
        call.  At most plan.prefill_chunk tokens in all.  No sequence's bits depend on the others.  Raises what feed()
        raises; after a ReadError all these states must be cleared.
        """
        ids: list[int] = []
        owned, lasts = [], []
        for state, tokens in parts:
            self.check(tokens)
            self._check_room(state, len(tokens))
            owned.append((state, slice(len(ids), len(ids) + len(tokens))))
            ids += tokens
            lasts.append(len(ids) - 1)
        if len(ids) > self.plan.prefill_chunk:
            raise PromptError(f"{len(ids)} tokens in one step: at most {self.plan.prefill_chunk} fit")
        rows = [lasts[i] for i in wanted] or slice(0)
        self._record(parts)
        with self._parts.warming.step():
            return self._parts.model.forward_batch(np.array(ids, np.int32), owned, self._parts.experts, rows)

    def _record(self, parts: Sequence[tuple[SequenceState, Sequence[int]]]) -> None:
        if self._parts.recorder is not None:
            self._parts.recorder.begin([(id(state), state.position, tokens) for state, tokens in parts])

    def logits(self, ids: list[int]) -> F32:
        """Logits [tokens, vocab] float32 of every position of a fresh sequence."""
        self.start()
        return self.feed(ids)

    def generate_ids(
        self,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: set[int],
        constraint: Constraint | None = None,
    ) -> Iterator[int]:
        """New token ids one by one; a stop token ends the sequence and is not yielded.

        constraint: which tokens may come; when it is done the sequence ends without a stop token.
        Afterwards finish_reason is "stop" or "length".  Raises what feed() and the constraint raise.
        """
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token")
        if len(prompt) >= self.plan.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.plan.context}: "
                "shorten it or raise --context"
            )
        self.start()
        self.finish_reason = None
        timing = self._timing = _Timing(prompt_tokens=len(prompt))
        self._prompt_store = self._decode_store = self._parts.cache.stats()
        self._decode_reads = self._parts.reader.stats()
        began = time.perf_counter()
        logits = self.feed(prompt, "last")
        timing.prompt_seconds = time.perf_counter() - began
        self._decode_store = self._parts.cache.stats()
        self._decode_reads = self._parts.reader.stats()
        yield from self._continue(logits, prompt, params, stop_ids, constraint)

    @property
    def notice(self) -> str:
        """One line about a usage file that could not be used or written; empty if all is well."""
        return self._parts.warming.notice

    def cache_stats(self) -> CacheStats:
        """Counters of the expert cache since the bundle was opened.  Thread-safe."""
        return self._parts.cache.stats()

    @property
    def cache(self) -> ExpertCache:
        """The experts in memory, for somebody who watches; only its thread-safe methods."""
        return self._parts.cache

    @property
    def identity(self) -> str:
        """All that determines the bits of a sequence's state, apart from its tokens."""
        options, plan = self._options, self.plan
        bundle = loading.bundle_identity(self.bundle)
        parts = (bundle, options.experts_per_token, options.activations, plan.kv_cache)
        return "/".join(map(str, parts))

    def stats(self) -> dict[str, Any]:
        """Speeds, bound, hit rate, bytes and memory of the last request (see README for each)."""
        timing, now = self._timing, self._parts.cache.stats()
        reads = now.since(self._prompt_store)
        decode = now.since(self._decode_store)
        steps = max(timing.new_tokens - 1, 0)
        return {
            "prompt_tokens": timing.prompt_tokens,
            "completion_tokens": timing.new_tokens,
            "prefill_tok_s": _rate(timing.prompt_tokens, timing.prompt_seconds),
            "decode_tok_s": _rate(steps, timing.new_seconds),
            "bound_tok_s": decode_bound(self._parts, decode.missed_bytes / steps, self._drive_rate())
            if steps
            else None,
            "hit_rate": reads.total.hit_rate,
            "decode_hit_rate": decode.total.hit_rate,
            "bytes_read": reads.bytes_read,
            "stall_seconds": reads.total.stall_seconds,
            "peak_memory_bytes": env.peak_memory(),
            "budget_bytes": self.plan.budget_nbytes,
            "budget_reason": self.plan.budget_reason,
            "expert_slots": self.plan.slots,
            "experts": self.plan.experts,
            "io": self._parts.reader.mode,
        }

    def _continue(
        self,
        logits: F32,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: set[int],
        constraint: Constraint | None,
    ) -> Iterator[int]:
        sampler = Sampler(params, prompt)
        timing = self._timing
        room = self.plan.context - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        stops = stop_ids | set(params.stop_token_ids)
        for produced in range(limit):
            token = sampler.sample(logits[-1], None if constraint is None else constraint.mask())
            timing.new_tokens += 1
            if token in stops:
                self.finish_reason = "stop"
                return
            if constraint is not None:
                constraint.accept(token)
            yield token
            if constraint is not None and constraint.is_done:
                self.finish_reason = "stop"
                return
            if produced + 1 < limit:
                began = time.perf_counter()
                logits = self.feed([token], "last")
                timing.new_seconds += time.perf_counter() - began
        self.finish_reason = "length"

    def _drive_rate(self) -> float:
        """Bytes per second while at least one read of this request's decoding was in flight."""
        _, nbytes, seconds, _ = self._parts.reader.stats()
        busy = seconds - self._decode_reads[2]
        return (nbytes - self._decode_reads[1]) / busy if busy > 0 else 0.0

    def check(self, ids: Sequence[int]) -> None:
        """Raises PromptError when there are no ids, or one is outside the vocabulary."""
        if not ids:
            raise PromptError("no tokens to process: give at least one")
        vocab = self._parts.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            raise PromptError(
                f"a token id is outside the vocabulary of {vocab}: use the bundle's own tokenizer"
            )

    def _check_room(self, state: SequenceState, more: int) -> None:
        if state.position + more > self.plan.context:
            raise PromptError(
                f"{state.position + more} tokens do not fit the context of {self.plan.context}: raise --context"
            )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count and seconds > 0 else None
