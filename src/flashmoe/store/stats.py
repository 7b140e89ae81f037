"""What the cache counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of counters since the cache was made; bytes and seconds."""

    hits: int
    misses: int
    bytes_read: int
    stall_seconds: float

    @property
    def hit_rate(self) -> float | None:
        """Share of requested experts that were in memory; None before the first request."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    def since(self, earlier: CacheStats) -> CacheStats:
        """What happened after `earlier`."""
        return CacheStats(
            self.hits - earlier.hits,
            self.misses - earlier.misses,
            self.bytes_read - earlier.bytes_read,
            self.stall_seconds - earlier.stall_seconds,
        )
