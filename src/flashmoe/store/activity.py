"""Which experts were asked for lately: for a picture of the cache at work."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

# Bits of an expert in a picture.
RESIDENT = 1  # in memory now
HIT = 2  # was asked for since the last picture, and was in memory the last time
MISS = 4  # the same, and was not
IN_FLIGHT = 8  # is being read now


class Activity:
    """How each expert's last use ended, a byte for each, since the marks were taken last.

    The last use, not all: of a small model every expert misses once within a picture, whatever its hit rate is.

    One thread writes and another one takes, without a lock: what is marked while the marks are being taken may be
    lost, and only a picture is poorer for it.
    """

    def __init__(self, experts: Mapping[int, int]) -> None:
        """experts: layer -> how many it has."""
        self._experts = dict(experts)
        self._rows = self._empty()

    def asked(self, layer: int, experts: Sequence[int], resident: Container[int]) -> None:
        """Experts were asked for; 0.04 us for each of them."""
        row = self._rows[layer]
        for expert in experts:
            row[expert] = HIT if expert in resident else MISS

    def take(self) -> dict[int, bytearray]:
        """layer -> marks since the last call; the caller owns them."""
        rows, self._rows = self._rows, self._empty()
        return rows

    def _empty(self) -> dict[int, bytearray]:
        return {layer: bytearray(count) for layer, count in self._experts.items()}
