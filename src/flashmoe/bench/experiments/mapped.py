"""mmap: the kernels read experts where the page cache has them, and fault in the pages that are missing."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator, KeysView, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from flashmoe.bench.experiments.base import UnavailableError, Variant, streamed_experts
from flashmoe.engine.loading import QUEUE_DEPTH, Parts
from flashmoe.store.cache import ExpertCache
from flashmoe.store.slots import SlotArena
from flashmoe.store.stats import CacheStats, LayerCounts

Ready = list[tuple[int, int]]  # (expert, address)

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: Python's mmap does not name it
_ADVICE = {"willneed": getattr(mmap, "MADV_WILLNEED", 3), "populate": _POPULATE_READ}


class _Space:
    """Stands in for the pool: a "slot" is an address."""

    address, record_nbytes, count = 0, 1, sys.maxsize


class _Request:
    """A request that waits for nothing: whatever is missing is faulted in by the kernels."""

    outstanding = 0

    def __init__(self, hits: Ready) -> None:
        self.hits = hits

    def next_ready(self) -> Ready:
        return []

    def foresee(self, *guesses: tuple[int, Sequence[int]]) -> None:
        """Nothing is read ahead: the operating system decides."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is outstanding."""


class MappedRecords:
    """Does for StreamedExperts what an ExpertCache does, over mappings of the experts files.

    advise: called with (address, bytes) of each expert of a step before it is computed; None: nothing.
    """

    def __init__(self, parts: Parts, advise: Callable[[int, int], None] | None) -> None:
        self.experts_per_token = parts.cache.experts_per_token
        self._advise = advise
        self._pool = ThreadPoolExecutor(QUEUE_DEPTH)
        if len(parts.bundle.experts_dirs) > 1:
            raise UnavailableError("experts in several directories are not one mapping: try another bundle")
        self._maps = {layer.layer: _map(layer.path) for layer in parts.bundle.expert_layers}
        self._nbytes = {layer.layer: layer.record_nbytes for layer in parts.bundle.expert_layers}
        self._addresses = {
            layer: int(np.frombuffer(mapping, np.uint8).ctypes.data) for layer, mapping in self._maps.items()
        }
        count = parts.model.config.num_experts
        self._everyone = dict.fromkeys(range(count))
        self._counts = {layer: LayerCounts() for layer in self._maps}

    @property
    def whole(self) -> bool:
        """Only the operating system knows what is in memory: each step asks."""
        return False

    def request(self, layer: int, experts: Sequence[int]) -> _Request:
        """All experts, as hits."""
        return _Request(self._ready(layer, experts))

    def stream(
        self, layer: int, experts: Sequence[int], most: int, then: tuple[int, Sequence[int]] | None = None
    ) -> Iterator[Ready]:
        """Batches of `most` experts."""
        for begin in range(0, len(experts), most):
            yield self._ready(layer, experts[begin : begin + most])

    def stats(self) -> CacheStats:
        """Nothing is counted: what is a hit only the operating system knows."""
        return CacheStats(dict(self._counts), 0, 0, 0.0, 0.0)

    def resident_experts(self, layer: int) -> KeysView[int]:
        """All of them: nothing is to be read ahead."""
        return self._everyone.keys()

    def note(self) -> str:
        """See Variant."""
        return ""

    def close(self) -> None:
        """See Variant.  The mappings end with the process: addresses into them may still be around."""
        self._pool.shutdown()

    def _ready(self, layer: int, experts: Sequence[int]) -> Ready:
        first, nbytes = self._addresses[layer], self._nbytes[layer]
        ready = [(expert, first + expert * nbytes) for expert in experts]
        if self._advise is not None:
            advise = self._advise
            for _ in self._pool.map(lambda one: advise(one[1], nbytes), ready):
                pass  # an error of any of them is raised here
        return ready


def install(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """setting: "faults", or the advice that is given for a step's experts first: "willneed" or "populate"."""
    advise = None if setting == "faults" else _adviser(_ADVICE[setting])
    records = MappedRecords(parts, advise)
    if advise is not None:
        advise(next(iter(records._addresses.values())), mmap.PAGESIZE)  # raises where the kernel is too old
    # By their protocols: both stand in for classes whose other methods nobody calls here.
    parts.cache = cast(ExpertCache, records)
    parts.experts = streamed_experts(parts, parts.cache, cast(SlotArena, _Space()), "off")
    return records


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def _adviser(advice: int) -> Callable[[int, int], None]:
    library: Any = ctypes.CDLL(None, use_errno=True)

    def advise(address: int, nbytes: int) -> None:
        if library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise UnavailableError(f"this system refuses madvise({advice}): {reason}")

    return advise
