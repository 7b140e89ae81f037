"""A reader whose threads are Python's: slower to hand out a read, and free to do anything with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

from flashmoe.bundle.codecs import U8
from flashmoe.store.reader import BulkReads, Read


def target(read: Read) -> U8:
    """Where a read lands: u8 [bytes of the read]."""
    _, _, nbytes, buffer, at = read
    array: U8 = buffer.array()
    return array[at : at + nbytes]


class Files:
    """Opened files and whole reads of them.  Thread-safe."""

    def __init__(self, paths: Sequence[Path], direct: bool) -> None:
        self._paths = list(paths)
        flags = os.O_RDONLY | os.O_CLOEXEC | (getattr(os, "O_DIRECT", 0) if direct else 0)
        self._descriptors: list[int] = []
        try:
            for path in paths:
                self._descriptors.append(os.open(path, flags))
        except OSError:
            self.close()
            raise

    def read(self, file: int, offset: int, out: U8) -> None:
        """Fill `out` from `offset` on.  Raises OSError, also when the file ends before."""
        view, done = memoryview(out.data), 0
        while done < len(view):
            got = os.preadv(self._descriptors[file], [view[done:]], offset + done)
            if got == 0:
                raise OSError(f"{self._paths[file]}: the file ends at byte {offset + done}")
            done += got

    def fetch(self, read: Read) -> None:
        """Perform a Read."""
        self.read(read[0], read[1], target(read))

    def close(self) -> None:
        """No more reads."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


class ThreadedReader(BulkReads):
    """Implements ExpertReader with `fetch`, called by so many Python threads."""

    def __init__(self, fetch: Callable[[Read], None], threads: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._jobs: SimpleQueue[tuple[Read, int] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self._outstanding = 0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read, tag: int) -> None:
        """See ExpertReader."""
        self._outstanding += 1
        self._jobs.put((read, tag))

    def close(self) -> None:
        """End the threads; reads in flight finish first."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _completions(self) -> list[tuple[int, str]]:
        if not self._outstanding:
            return []
        done = [self._done.get()]
        while not self._done.empty():
            done.append(self._done.get())
        self._outstanding -= len(done)
        return done

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._perform(*job)

    def _perform(self, read: Read, tag: int) -> None:
        error = (
            f"file {read[0]} at byte {read[1]}"  # of whatever is not an OSError: its traceback says the rest
        )
        try:
            self._fetch(read)
            error = ""
        except OSError as problem:
            error = str(problem)
        finally:
            self._done.put((tag, error))
