"""The rates that a forecast needs, measured here: the drive, the memory, the integer products.

The drive is read as the store reads it: whole records at random places, by the store's own reader and queue depth.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

import numpy as np

from flashmoe import env
from flashmoe.engine.loading import QUEUE_DEPTH
from flashmoe.errors import ConfigError, ReadError
from flashmoe.kernels.cpu import CpuOps
from flashmoe.store.reader import AlignedBuffer, NativeReader
from flashmoe.types import format_size

# Reads of a layer that are issued together: a layer misses a few of its experts, not a queue full.
BATCHES = (1, 2, 4, 8)
SCRATCH_NBYTES = (
    512 << 20
)  # far more than a drive's own memory would hold by chance between two reads of a record
_SCRATCH_RECORDS = 64  # of very large experts
_WRITE_NBYTES = 8 << 20
_FREE_MARGIN = 64 << 20
# A shared drive changes within a second: rounds over all batch sizes, long enough to see several of its moods.
_SECONDS = 2.0
_STREAM_SECONDS = 0.7
# Fresh memory is filled as far as the largest pool, for as long as this.  Half a GiB could be what a process that just
# ended has given back: the host of a virtual machine has that still at hand, but not the gigabytes of a pool.
_FILL_SECONDS = 4.0
_FILL_BATCH = 64  # reads issued together
_FILL_NBYTES = 512 << 20  # at least, whatever the pool
_FILL_SHARE = 2  # of the memory that is free, at most half is filled
_PLACES = 64  # of the other measurements
_MEMORY_NBYTES = 256 << 20
_MEMORY_SECONDS = 1.0
_STRIDE = 7919  # a prime: neither sequential nor ever the same record twice in a row


@dataclass(frozen=True)
class DriveRates:
    """batches: (reads issued together, seconds until all have landed); stream, fill: bytes per second; io: "direct"
    or "buffered"."""

    batches: tuple[tuple[int, float], ...]
    stream: float
    fill: float
    io: str


@contextmanager
def scratch_file(directory: Path, record_nbytes: int) -> Iterator[Path]:
    """A file of random records in `directory`, gone afterwards, after Ctrl-C too.

    Raises ConfigError when there is no room or no permission.
    """
    nbytes = scratch_records(record_nbytes) * record_nbytes
    _check_room(directory, nbytes)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".flashmoe-plan-"))
            _write_random(file, nbytes)
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield Path(file.name)


def scratch_records(record_nbytes: int) -> int:
    """Records in a scratch file."""
    return max(_SCRATCH_RECORDS, -(-SCRATCH_NBYTES // record_nbytes))


def measure_drive(files: list[tuple[Path, int]], record_nbytes: int, pool_nbytes: int = 0) -> DriveRates:
    """Read records of `files` (path, records in it); pool_nbytes: of the largest pool to be.  Raises ReadError.

    Half of the rounds come before and half after fresh memory is filled: a shared drive changes from second to second.
    Fresh memory comes as late as that: what other processes have just given back should be gone by then.
    """
    reader = NativeReader([path for path, _ in files], queue_depth=QUEUE_DEPTH)
    counts = [count for _, count in files]
    try:
        probe = _DriveProbe(reader, counts, record_nbytes, _PLACES)
        probe.measure()
        room = min(max(pool_nbytes, _FILL_NBYTES), env.memory_available() // _FILL_SHARE)
        fill = _DriveProbe(reader, counts, record_nbytes, room // record_nbytes).fill()
        probe.measure()
        return DriveRates(probe.batches(), probe.stream(), fill, reader.mode)
    finally:
        reader.close()


def measure_memory(threads: int) -> float:
    """Bytes per second at which all threads together read memory, the median over a second."""
    data = np.ones(_MEMORY_NBYTES, np.uint8)
    ops, rates = CpuOps(threads), list[float]()
    end = time.perf_counter() + _MEMORY_SECONDS
    while not rates or time.perf_counter() < end:
        rates.append(ops.read_bandwidth(data))
    return median(rates)


def measure_products(threads: int) -> float:
    """Integer multiply-adds per second of all threads together."""
    return CpuOps(threads).int8_peak()


class _DriveProbe:
    """Reads into a buffer that was untouched when the probe was made."""

    def __init__(self, reader: NativeReader, counts: list[int], record_nbytes: int, places: int) -> None:
        self._reader, self._counts, self._nbytes = reader, counts, record_nbytes
        self._places = max(QUEUE_DEPTH, places)
        self._buffer = AlignedBuffer(self._places * record_nbytes, True)
        self._next = 0
        self._seconds, self._rounds = dict.fromkeys(BATCHES, 0.0), 0
        self._streamed, self._stream_seconds = 0, 0.0

    def fill(self) -> float:
        """Bytes per second into fresh memory: the system finds and clears its pages meanwhile."""
        began, done = time.perf_counter(), 0
        while done < self._places and (not done or time.perf_counter() < began + _FILL_SECONDS):
            batch = min(_FILL_BATCH, self._places - done)
            self._together(batch, done)
            done += batch
        return done * self._nbytes / (time.perf_counter() - began)

    def measure(self) -> None:
        """Half of the rounds over all batch sizes, and half of the stream."""
        end = time.perf_counter() + _SECONDS / 2
        first = self._rounds
        while self._rounds == first or time.perf_counter() < end:
            for size in BATCHES:
                self._seconds[size] += self._together(size)
            self._rounds += 1
        self._stream_on(_STREAM_SECONDS / 2)

    def batches(self) -> tuple[tuple[int, float], ...]:
        """Mean seconds of each batch size."""
        return tuple((size, seconds / self._rounds) for size, seconds in self._seconds.items())

    def stream(self) -> float:
        """Bytes per second with the queue always full."""
        return self._streamed * self._nbytes / self._stream_seconds

    def _stream_on(self, seconds: float) -> None:
        began = time.perf_counter()
        for place in range(QUEUE_DEPTH):
            self._submit(place)
        while time.perf_counter() < began + seconds:
            for place in self._landed():
                self._streamed += 1
                self._submit(place)
        self._stream_seconds += time.perf_counter() - began
        while self._landed():
            pass  # what is still in flight

    def _together(self, reads: int, first: int = 0) -> float:
        began = time.perf_counter()
        for place in range(first, first + reads):
            self._submit(place)
        left = reads
        while left:
            left -= len(self._landed())
        return time.perf_counter() - began

    def _submit(self, place: int) -> None:
        file = self._next % len(self._counts)
        record = self._next // len(self._counts) * _STRIDE % self._counts[file]
        self._next += 1
        where = file, record * self._nbytes, self._nbytes, self._buffer, place * self._nbytes
        self._reader.submit(where, place)

    def _landed(self) -> list[int]:
        completions = self._reader.wait()
        for _, error in completions:
            if error:
                raise ReadError(f"cannot read {error}: give --drive GB/s to plan without reading")
        return [place for place, _ in completions]


def _write_random(file: IO[bytes], nbytes: int) -> None:
    rng = np.random.default_rng(0)  # random, so that no drive can compress it
    while nbytes:
        piece = rng.bytes(min(nbytes, _WRITE_NBYTES))
        file.write(piece)
        nbytes -= len(piece)
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # buffered reads, where direct ones are refused, would find it in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{directory}: cannot write a test file ({error.strerror}): name another --dir, or give --drive GB/s"
    )


def _check_room(directory: Path, nbytes: int) -> None:
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is no directory: give --dir one on the drive that will hold the model"
        )
    free = shutil.disk_usage(directory).free
    if free < nbytes + _FREE_MARGIN:
        raise ConfigError(
            f"{directory}: measuring the drive needs {format_size(nbytes + _FREE_MARGIN)} and {format_size(free)} "
            "are free: free some, name another --dir, or give --drive GB/s"
        )
