"""How large a pool has to be, and what of it a prompt's stream takes."""

from __future__ import annotations

MAX_IN_FLIGHT = 8  # records that keep the drive busy: the reader's queue depth
# Slots through which a stream passes what it does not keep.  Many, because they also read on while the layer after is
# not yet at its experts (a third of a prompt's time: 100 records on a drive of 2 GB/s), and few enough that decoding
# afterwards hardly misses them.
_STAGING_SHARE = 8
MAX_STAGING = 128


def min_slots(experts_per_token: int) -> int:
    """The smallest pool: one step's experts of one layer, and two to stream a prompt."""
    return max(2, experts_per_token)


def staging_slots(slots: int) -> int:
    """Of a full pool, those through which a stream passes what it does not keep."""
    return min(max(2 * MAX_IN_FLIGHT, slots // _STAGING_SHARE), MAX_STAGING, slots // 2)
