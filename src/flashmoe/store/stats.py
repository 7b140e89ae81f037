"""What the cache counts."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class LayerCounts:
    """Experts asked of one layer, and the seconds for which the engine waited for its reads.

    foreseen: those of the misses whose read had begun before they were asked for.
    """

    hits: int = 0
    misses: int = 0
    foreseen: int = 0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts that were in memory; None before the first request."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    def minus(self, earlier: LayerCounts) -> LayerCounts:
        """The difference of each counter."""
        return LayerCounts(
            self.hits - earlier.hits,
            self.misses - earlier.misses,
            self.foreseen - earlier.foreseen,
            self.stall_seconds - earlier.stall_seconds,
        )


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of counters since the cache was made; bytes and seconds.

    wasted_bytes: of bytes_read, those that were read ahead and not asked for by the step that they were read for.
    busy_seconds: at least one read was outstanding; read_seconds: the same, counted for each outstanding read.
    """

    layers: dict[int, LayerCounts]
    bytes_read: int
    wasted_bytes: int
    busy_seconds: float
    read_seconds: float

    @property
    def total(self) -> LayerCounts:
        """Summed over the layers."""
        counts = self.layers.values()
        return LayerCounts(
            sum(layer.hits for layer in counts),
            sum(layer.misses for layer in counts),
            sum(layer.foreseen for layer in counts),
            sum(layer.stall_seconds for layer in counts),
        )

    @property
    def missed_bytes(self) -> int:
        """What had to be read."""
        return self.bytes_read - self.wasted_bytes

    @property
    def queue_depth(self) -> float | None:
        """Mean number of outstanding reads while there were any."""
        return self.read_seconds / self.busy_seconds if self.busy_seconds > 0 else None

    def since(self, earlier: CacheStats) -> CacheStats:
        """What happened after `earlier`."""
        return CacheStats(
            {layer: counts.minus(earlier.layers[layer]) for layer, counts in self.layers.items()},
            self.bytes_read - earlier.bytes_read,
            self.wasted_bytes - earlier.wasted_bytes,
            self.busy_seconds - earlier.busy_seconds,
            self.read_seconds - earlier.read_seconds,
        )


class QueueDepth:
    """Integrates the number of outstanding reads over time."""

    def __init__(self) -> None:
        self.busy_seconds = self.read_seconds = 0.0
        self._outstanding, self._since = 0, 0.0

    def change(self, by: int) -> None:
        """So many reads were submitted, or (negative) have been handed out."""
        now = time.perf_counter()
        if self._outstanding:
            self.busy_seconds += now - self._since
            self.read_seconds += self._outstanding * (now - self._since)
        self._outstanding += by
        self._since = now

    def clear(self) -> None:
        """Nothing is outstanding any more, whatever was lost."""
        self.change(-self._outstanding)
