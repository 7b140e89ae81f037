"""Reading the experts that earlier runs used most, while nobody needs the drive."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from flashmoe.errors import ReadError
from flashmoe.store.cache import ExpertCache

# A step that comes waits for the reads of one batch.  16 records of the 35B keep eight reads in flight most of the
# time and are there after 12 ms; of larger records there are fewer.
_BATCH = 16
_BATCH_NBYTES = 32 << 20
# Between two tokens of an answer there is less; reads in there would only delay what is really asked for.
_QUIET_SECONDS = 0.05


class WarmStart:
    """Fills free slots of a cache from a thread of its own whenever no step was running for a while.

    A context manager around every step of the thread that uses the cache: while it is inside, the cache is its own.
    It never takes a slot from what is resident, and ends when no slot is free or everything is read.
    """

    def __init__(
        self, cache: ExpertCache, favourites: Mapping[int, Sequence[int]], record_nbytes: int
    ) -> None:
        """favourites: layer -> experts, the most valuable last."""
        self._cache, self._favourites = cache, favourites
        self._batch = max(1, min(_BATCH, _BATCH_NBYTES // record_nbytes))
        self._turn, self._ended = threading.Lock(), threading.Event()
        self._stepping, self._last_step = False, 0.0
        self.error = ""  # why it gave up
        self._thread = threading.Thread(target=self._run, name="flashmoe-warm-start", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        self._stepping = True
        self._turn.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last_step, self._stepping = time.monotonic(), False
        self._turn.release()

    @property
    def running(self) -> bool:
        """Whether it has something left to do."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End it, after the reads in flight.  Harmless when repeated."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for layer, experts in self._favourites.items():
                for batch in self._batches(experts):
                    if not self._when_quiet(layer, batch):
                        return
                with self._turn:
                    self._cache.prefer(layer, experts)
        except ReadError as error:  # whoever needs that expert is told; the others are only not read ahead
            self.error = str(error)

    def _batches(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """In file order."""
        ascending = sorted(experts)
        for begin in range(0, len(ascending), self._batch):
            yield ascending[begin : begin + self._batch]

    def _when_quiet(self, layer: int, experts: Sequence[int]) -> bool:
        """Read them as soon as nobody else has needed the drive for a while; False when it is over."""
        while not self._ended.is_set():
            if self._stepping or time.monotonic() - self._last_step < _QUIET_SECONDS:
                if not self._cache.free_slots:
                    return False
                self._ended.wait(_QUIET_SECONDS)
                continue
            with self._turn:
                return self._cache.fill(layer, experts)
        return False
