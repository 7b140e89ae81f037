"""One arm of a comparison, in a process of its own: the engine's default or one experiment, on given tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from flashmoe import env
from flashmoe.bench.experiments import catalog
from flashmoe.bench.experiments.base import Plain, UnavailableError, Variant, exchange, expert_paths
from flashmoe.bench.experiments.footprint import anonymous_nbytes, cached_nbytes, drive_nbytes, drop_cached
from flashmoe.bench.process import serve
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.loading import Parts
from flashmoe.store.reader import BulkReads, NativeReader, Read


@dataclass(frozen=True)
class ArmOptions:
    """What one process runs.

    experiment: a name of the catalog, None for the default.  ids: tokens, the first `warm` before the clock starts.
    scratch: folder of a compressed copy.  record: list what is read for each token.
    """

    bundle: str
    memory_bytes: int | None
    expert_slots: int | None
    experiment: str | None
    ids: tuple[int, ...]
    warm: int
    scratch: str | None = None
    record: bool = False


class _RecordingReader(BulkReads):
    """The engine's reader, and a list of what was asked of it."""

    def __init__(self, inner: NativeReader) -> None:
        super().__init__()
        self._inner = inner
        self.places: list[tuple[int, int, int]] = []

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        self.places.append(read[:3])
        self._inner.submit(read, tag, prefetch)

    def withdraw(self) -> list[int]:
        return self._inner.withdraw()

    def _completions(self) -> list[tuple[int, str]]:
        return self._inner.wait()

    def _completed(self) -> list[tuple[int, str]]:
        return self._inner.poll()


def measure(options: ArmOptions) -> dict[str, Any]:
    """Speed, digests of the logits, bytes and memory as JSON values; {"unavailable": reason} where it cannot run."""
    engine_options = EngineOptions(
        options.memory_bytes, context=max(len(options.ids), 2), expert_slots=options.expert_slots
    )
    with Engine.open(Path(options.bundle), engine_options) as engine:
        parts = engine._parts
        files = expert_paths(parts)
        drop_cached(files)
        places: list[tuple[int, int, int]] = []
        try:
            variant = _start(parts, options, places)
        except UnavailableError as error:
            return {"unavailable": str(error)}
        try:
            return _run(engine, options, variant, places) | {
                "slots": engine.plan.slots,
                "experts": engine.plan.experts,
                "io": parts.reader.mode,
                "page_cache_bytes": cached_nbytes(files),
                "process_bytes": anonymous_nbytes(),
                "peak_memory_bytes": env.peak_memory(),
                "budget_bytes": engine.plan.budget_nbytes,
                "note": variant.note(),
            }
        finally:
            variant.close()


def _start(parts: Parts, options: ArmOptions, places: list[tuple[int, int, int]]) -> Variant:
    if options.experiment is not None:
        return catalog.find(options.experiment).start(
            parts, None if options.scratch is None else Path(options.scratch)
        )
    if options.record:
        reader = _RecordingReader(parts.reader)
        reader.places = places
        exchange(parts, reader=reader)
    return Plain()


def _run(
    engine: Engine, options: ArmOptions, variant: Variant, places: list[tuple[int, int, int]]
) -> dict[str, Any]:
    """Feed the tokens one by one; bytes and seconds are of those after the first `warm`."""
    parts = engine._parts
    engine.start()
    digests, ends = [], []
    began, drive, before = time.perf_counter(), drive_nbytes(), parts.cache.stats()
    for i, token in enumerate(options.ids):
        if i == options.warm:
            began, drive, before = time.perf_counter(), drive_nbytes(), parts.cache.stats()
        digests.append(xxhash.xxh3_64_hexdigest(engine.feed([token], "last").data))
        ends.append(len(places))
    seconds, after = time.perf_counter() - began, drive_nbytes()
    done = parts.cache.stats().since(before)
    tokens = len(options.ids) - options.warm
    read = done.bytes_read if drive is None or after is None else after - drive
    return {
        "tok_s": tokens / seconds,
        "logits_xxh3": digests,
        "bytes_per_token": read / tokens,
        "hit_rate": done.total.hit_rate,
        "stall_share": done.total.stall_seconds / seconds,
        "places": places,
        "places_ends": ends,
    }


if __name__ == "__main__":
    serve(lambda options: measure(ArmOptions(**options)))
