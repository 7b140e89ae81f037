"""How reads and arithmetic meet: the pool's pages, and reading everything before computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flashmoe.bench.experiments.base import Plain, Variant, exchange
from flashmoe.engine.loading import Parts
from flashmoe.store.cache import ExpertCache
from flashmoe.store.request import Request
from flashmoe.store.slots import SlotArena


class SerialCache(ExpertCache):
    """A cache whose requests return when all their experts are in memory."""

    def request(self, layer: int, experts: Sequence[int]) -> Request:
        """See ExpertCache; nothing is outstanding afterwards."""
        request = super().request(layer, experts)
        try:
            while landed := request.next_ready():
                request.hits += landed
        except BaseException:  # Ctrl-C too: as leaving the request would
            self._drain(request._landing)
            raise
        request.hits.sort()  # those who ask expect their own, ascending order
        return request


def install_serial(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """No lookahead either: while the processor computes the drive is idle."""
    exchange(parts, cache_class=SerialCache, lookahead="off")
    return Plain()


def install_small_pages(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """The same pool in pages of 4 KiB."""
    exchange(parts, arena=SlotArena(parts.plan.slots, parts.plan.record_nbytes, huge=False))
    return Plain()
