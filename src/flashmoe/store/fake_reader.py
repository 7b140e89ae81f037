"""A reader that does what a test tells it: order, delay and failure of each read are scripted, and no thread runs."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashmoe.store.reader import BulkReads, Read

_BLOCK = 4096
# What a buffer holds until its read completes: a slot used too early cannot pass for its record.
_POISON = 0xA5


@dataclass(frozen=True)
class Fault:
    """What happens to a read that touches byte ``offset`` of file ``file``, the next ``times`` times.

    errno: it fails with this error and leaves the buffer without its bytes.  short: only so many bytes arrive.
    flip: it succeeds with a wrong bit at ``offset``, as a failing drive may.  delay: wait() passes it over so
    many times, unless nothing else is left.  seconds: its wait() takes so long, as on a slow drive.
    """

    file: int
    offset: int
    errno: int = 0
    short: int | None = None
    flip: bool = False
    delay: int = 0
    seconds: float = 0.0
    times: int = 1


@dataclass(eq=False)  # two reads of the same bytes are still two
class _Pending:
    read: Read
    tag: int
    faults: list[Fault]
    delay: int


class FakeReader(BulkReads):
    """Implements ExpertReader over bytes in memory or files, which it opens at once.  Not thread-safe.

    order: given the number n of reads that may complete now, the positions (0 is the oldest) of those that
    complete in this wait(), in this order, at least one; without it all complete, oldest first.
    ``reads`` lists (file, offset, bytes) of everything submitted, ``withdrawn`` of what was taken back, for assertions.
    ``gone``: while this errno is not 0 every read that completes fails with it.
    """

    mode, reason = "scripted", "for tests"

    def __init__(
        self, files: Sequence[bytes | Path], order: Callable[[int], Sequence[int]] | None = None
    ) -> None:
        super().__init__()
        self._files = list(files)
        self._descriptors = {f: os.open(f, os.O_RDONLY) for f in files if isinstance(f, Path)}
        self._close = weakref.finalize(self, _close_all, list(self._descriptors.values()))
        self._sizes = [f.stat().st_size if isinstance(f, Path) else len(f) for f in files]
        self._order = order or range
        self._faults: dict[Fault, int] = {}  # -> how often it is still to happen
        self._pending: list[_Pending] = []
        self._waiting: list[_Pending] = []  # prefetches that have not begun
        self.reads: list[tuple[int, int, int]] = []
        self.withdrawn: list[tuple[int, int, int]] = []
        self.gone = 0

    @property
    def outstanding(self) -> int:
        """Reads submitted and not yet handed out by wait()."""
        return len(self._pending) + len(self._waiting)

    def close(self) -> None:
        """Close the files.  Harmless when repeated."""
        self._close()

    def stats(self) -> tuple[int, int, float, int]:
        """(reads, bytes, 0 seconds with a read in flight, no reads in flight) so far, as NativeReader.stats()."""
        nbytes = sum(read[2] for read in self.reads) - sum(read[2] for read in self.withdrawn)
        return len(self.reads) - len(self.withdrawn), nbytes, 0.0, 0

    def script(self, fault: Fault) -> None:
        """Let this happen to reads submitted from now on."""
        self._faults[fault] = self._faults.get(fault, 0) + fault.times

    def heal(self) -> None:
        """Forget what was scripted for reads that are not submitted yet."""
        self._faults.clear()

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        """See ExpertReader; refuses what the native reader refuses."""
        file, offset, nbytes, buffer, at = read
        if not 0 <= file < len(self._files):
            raise ValueError("file index out of range")
        if offset < 0 or nbytes < 1 or offset + nbytes > self._sizes[file]:
            raise ValueError(f"a read beyond the end of {self._name(file)}")
        if at < 0 or at + nbytes > buffer.nbytes:
            raise ValueError("a read beyond the end of its buffer")
        if offset % _BLOCK or at % _BLOCK:
            raise ValueError("file and buffer offsets must be multiples of 4096")
        buffer.array()[at : at + nbytes] = _POISON
        faults = self._take_faults(file, offset, nbytes)
        delay = max((fault.delay for fault in faults), default=0)
        (self._waiting if prefetch else self._pending).append(_Pending(read, tag, faults, delay))
        self.reads.append((file, offset, nbytes))
        self._begin_prefetches()

    def withdraw(self) -> list[int]:
        """See ExpertReader."""
        withdrawn, self._waiting = self._waiting, []
        self.withdrawn += [pending.read[:3] for pending in withdrawn]
        return [pending.tag for pending in withdrawn]

    def _begin_prefetches(self) -> None:
        while self._waiting and len(self._pending) <= 1:
            self._pending.append(self._waiting.pop(0))

    def _completed(self) -> list[tuple[int, str]]:
        """What is not delayed; it begins what may begin then."""
        return [] if all(pending.delay for pending in self._pending) else self._completions()

    def _completions(self) -> list[tuple[int, str]]:
        """It never blocks: when every read is delayed, the least delayed ones are due."""
        if not self._pending:
            return []
        least = min(pending.delay for pending in self._pending)
        due = [pending for pending in self._pending if pending.delay == least]
        for pending in self._pending:
            pending.delay = max(0, pending.delay - max(1, least))
        done = [due[i] for i in self._order(len(due))]
        assert done, "the order must complete at least one read"
        self._pending = [pending for pending in self._pending if pending not in done]
        self._begin_prefetches()
        return [(pending.tag, self._complete(pending)) for pending in done]

    def _take_faults(self, file: int, offset: int, nbytes: int) -> list[Fault]:
        hit = [f for f in self._faults if f.file == file and offset <= f.offset < offset + nbytes]
        for fault in hit:
            self._faults[fault] -= 1
            if not self._faults[fault]:
                del self._faults[fault]
        return hit

    def _complete(self, pending: _Pending) -> str:
        """Move the bytes and tell the outcome in the native reader's words."""
        file, offset, nbytes, buffer, at = pending.read
        where = f"{self._name(file)} at byte {offset}"
        out = buffer.array()[at : at + nbytes]
        content = self._content(file, offset, nbytes)
        data = bytearray(content)
        if self.gone:
            return f"{where}: {os.strerror(self.gone)} (errno {self.gone})"
        for fault in pending.faults:
            time.sleep(fault.seconds)
            if fault.errno:
                return f"{where}: {os.strerror(fault.errno)} (errno {fault.errno})"
            if fault.short is not None:
                del data[fault.short :]
            elif fault.flip and fault.offset - offset < len(data):
                data[fault.offset - offset] = content[fault.offset - offset] ^ 1
        out[: len(data)] = memoryview(data)
        if len(data) < nbytes:
            return f"{where}: the file ends after {len(data)} of {nbytes} bytes"
        return ""

    def _content(self, file: int, offset: int, nbytes: int) -> bytes:
        source = self._files[file]
        if isinstance(source, bytes):
            return source[offset : offset + nbytes]
        return os.pread(self._descriptors[source], nbytes, offset)

    def _name(self, file: int) -> str:
        source = self._files[file]
        return str(source) if isinstance(source, Path) else f"file {file}"


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
