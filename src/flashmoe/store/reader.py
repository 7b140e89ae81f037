"""Reading records: the protocol, and the native reader behind it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from flashmoe._native import AlignedBuffer, Reader
from flashmoe.errors import ReadError

__all__ = ["AlignedBuffer", "ExpertReader", "NativeReader", "Read"]

# (file index, offset, bytes, buffer, offset in the buffer); offsets are multiples of 4096.
Read = tuple[int, int, int, AlignedBuffer, int]

MOST_IN_FLIGHT = 256  # whatever the queue depth
_BULK_TAG = 1 << 62  # of read_many's pieces: no number that a caller uses
_PIECE = 8 << 20  # large reads are cut into pieces that keep all I/O threads busy


class ExpertReader(Protocol):
    """Asynchronous reads into aligned buffers; each completes once, failures included, unless it is withdrawn."""

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        """Start a read.  `tag` (>= 0) comes back with its completion.  Raises ValueError for one out of range.

        prefetch: it begins only while no other read waits and at most one is in flight.
        """

    def wait(self) -> list[tuple[int, str]]:
        """Block until at least one read has completed: (tag, "" or what went wrong).  [] when none is left."""

    def poll(self) -> list[tuple[int, str]]:
        """What has completed since the last call, without blocking."""

    def withdraw(self) -> list[int]:
        """Take back the prefetches that have not begun: their tags."""

    def read_many(self, reads: Sequence[Read]) -> None:
        """Perform these reads, large ones in pieces.  Raises ReadError when one fails (after all have ended)."""

    def read_into(
        self, file: int, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int
    ) -> None:
        """One read, in pieces.  Raises ReadError."""


class BulkReads:
    """read_many and read_into over a reader's own submit and completions.

    Completions of other reads that come in meanwhile are kept for the next wait().
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, str]] = []

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        """See ExpertReader."""
        raise NotImplementedError

    def wait(self) -> list[tuple[int, str]]:
        """See ExpertReader.  Ctrl-C interrupts it."""
        return self._take_kept() or self._completions()

    def poll(self) -> list[tuple[int, str]]:
        """See ExpertReader."""
        return self._take_kept() or self._completed()

    def withdraw(self) -> list[int]:
        """See ExpertReader."""
        raise NotImplementedError

    def read_many(self, reads: Sequence[Read]) -> None:
        """See ExpertReader."""
        pieces = list(itertools.chain.from_iterable(_pieces(read) for read in reads))
        left, errors = len(pieces), []
        try:
            for piece in pieces:
                self.submit(piece, _BULK_TAG)
            while left:
                done = self._own_completions()
                left -= len(done)
                errors += [error for error in done if error]
        except BaseException:  # Ctrl-C too: these reads must not complete in somebody else's wait()
            while completions := self._completions():
                self._kept += [(tag, error) for tag, error in completions if tag != _BULK_TAG]
            raise
        if errors:
            raise ReadError(f"cannot read {errors[0]}: run `flashmoe verify` on the bundle")

    def read_into(
        self, file: int, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int
    ) -> None:
        """See ExpertReader."""
        self.read_many([(file, offset, nbytes, buffer, buffer_offset)])

    def _completions(self) -> list[tuple[int, str]]:
        """Block until at least one read has completed; [] when none is left."""
        raise NotImplementedError

    def _completed(self) -> list[tuple[int, str]]:
        """What has completed, without blocking."""
        raise NotImplementedError

    def _take_kept(self) -> list[tuple[int, str]]:
        kept, self._kept = self._kept, []
        return kept

    def _own_completions(self) -> list[str]:
        """Outcomes of pieces of read_many, perhaps none."""
        completions = self._completions()
        assert completions, "reads in flight never completed"
        self._kept += [(tag, error) for tag, error in completions if tag != _BULK_TAG]
        return [error for tag, error in completions if tag == _BULK_TAG]


class NativeReader(BulkReads):
    """Direct reads by a pool of threads or io_uring (native/io/).

    direct: "auto" falls back to buffered reads, with `reason` saying why; "on" insists; "off".  Buffered reads drop
    their pages from the page cache at once, so that it stays out of the memory budget.
    engine: "threads", which "auto" is, or "uring"; `engine_reason` says why that one (docs/decisions/007-reader.md).
    queue_depth: most reads in flight, 1 to 256.
    Thread-safe apart from read_many and read_into.  Raises ReadError when a file cannot be opened, or when the
    engine asked for is refused.
    """

    def __init__(
        self, paths: Sequence[Path], direct: str = "auto", engine: str = "auto", queue_depth: int = 8
    ) -> None:
        super().__init__()
        try:
            self._native = Reader([str(path) for path in paths], direct, engine, queue_depth)
        except ValueError as error:
            raise ReadError(f"cannot open {error}: check the bundle, or try --io buffered") from None
        except RuntimeError as error:
            raise ReadError(f"{error}: choose the engine 'threads' or 'auto'") from None

    @property
    def mode(self) -> str:
        """ "direct" or "buffered"."""
        return "direct" if self._native.direct else "buffered"

    @property
    def reason(self) -> str:
        """Why this mode."""
        return self._native.direct_reason

    @property
    def engine(self) -> str:
        """ "uring" or "threads"."""
        return self._native.engine

    @property
    def engine_reason(self) -> str:
        """Why this engine."""
        return self._native.engine_reason

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        """See ExpertReader."""
        self._native.submit(*read, tag, prefetch)

    def withdraw(self) -> list[int]:
        """See ExpertReader."""
        return self._native.withdraw()

    def _completions(self) -> list[tuple[int, str]]:
        return self._native.wait()

    def _completed(self) -> list[tuple[int, str]]:
        return self._native.poll()

    def close(self) -> None:
        """End the engine (reads in flight finish first) and close the files.  Call it once, last."""
        del self._native

    def stats(self) -> tuple[int, int, float, int]:
        """(reads, bytes, seconds with a read in flight, most reads in flight) so far."""
        return self._native.stats()


def _pieces(read: Read) -> list[Read]:
    file, offset, nbytes, buffer, at = read
    return [
        (file, offset + done, min(_PIECE, nbytes - done), buffer, at + done)
        for done in range(0, nbytes, _PIECE)
    ]
