"""The speed that the machine could reach at most, measured on the same files and memory as the run itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flashmoe.bundle.codecs import U8
from flashmoe.kernels.cpu import CpuOps
from flashmoe.store.reader import ExpertReader
from flashmoe.store.slots import SlotArena

if TYPE_CHECKING:
    from flashmoe.engine.loading import Parts

_PROBE_NBYTES = 64 << 20  # a few tens of milliseconds on a current drive
_MEMORY_PROBE_NBYTES = 256 << 20


def measure_drive(reader: ExpertReader, arena: SlotArena, files: list[tuple[int, int, int]]) -> float:
    """Bytes per second of whole-record reads at full queue depth into a still empty arena.

    files: (file index, records, bytes of a record) of each file of experts; reads are spread over them.
    """
    if not files:
        return float("inf")
    reads = max(1, min(_PROBE_NBYTES // arena.record_nbytes, sum(count for _, count, _ in files)))
    done = 0
    began = time.perf_counter()
    for first in range(0, reads, arena.count):
        batch = []
        for i in range(first, min(first + arena.count, reads)):
            file_index, count, nbytes = files[i % len(files)]
            record = (i // len(files)) * 7919 % count  # 7919: a prime, so that reads are not sequential
            batch.append(
                (file_index, record * nbytes, nbytes, arena.buffer, (i - first) * arena.record_nbytes)
            )
            done += nbytes
        reader.read_many(batch)
    return done / (time.perf_counter() - began)


def measure_memory(ops: CpuOps, data: U8) -> float:
    """Bytes per second at which all threads together read memory."""
    return ops.read_bandwidth(data[:_MEMORY_PROBE_NBYTES])


def decode_bound(parts: Parts, missed_nbytes_per_token: float, achieved: float) -> float:
    """Tokens per second if the drive and the memory were each always busy and fully overlapped.

    achieved: bytes per second that the drive gave while the run itself was reading.  Shared and virtual drives
    change their speed from minute to minute, so the better of the probe and the run is taken.
    """
    if parts.memory_bandwidth is None:
        parts.memory_bandwidth = measure_memory(parts.ops, parts.weights.data)
    memory_seconds = parts.token_nbytes / parts.memory_bandwidth
    drive_seconds = missed_nbytes_per_token / max(parts.drive_bandwidth, achieved)
    return 1.0 / max(memory_seconds, drive_seconds)
