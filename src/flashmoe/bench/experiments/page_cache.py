"""Trust the OS: experts are copied out of the page cache, instead of being kept in a pool or beside one."""

from __future__ import annotations

from pathlib import Path

from flashmoe.bench.experiments.base import Variant, exchange, reader_paths
from flashmoe.bench.experiments.threaded import Files, ThreadedReader
from flashmoe.engine.loading import QUEUE_DEPTH, Parts
from flashmoe.store.sizes import min_slots
from flashmoe.store.slots import SlotArena


class _Reads:
    def __init__(self, files: Files, reader: ThreadedReader) -> None:
        self._files, self._reader = files, reader

    def note(self) -> str:
        return ""

    def close(self) -> None:
        self._reader.close()
        self._files.close()


def install(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """setting: "control" (direct reads, the default's pool), "instead" or "beside" of a pool.

    "instead" leaves as many slots as one step of a layer needs, so every expert is copied each time it is used.
    The operating system's own read-ahead is on: that is part of trusting it.
    """
    files = Files(reader_paths(parts), direct=setting == "control" and parts.reader.mode == "direct")
    reader = ThreadedReader(files.fetch, QUEUE_DEPTH)
    arena = None
    if setting == "instead":
        slots = min_slots(parts.cache.experts_per_token)
        arena = SlotArena(slots, parts.plan.record_nbytes)
    exchange(parts, reader=reader, arena=arena)
    return _Reads(files, reader)
