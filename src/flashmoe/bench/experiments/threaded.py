"""A reader whose threads are Python's: slower to hand out a read, and free to do anything with it."""

from __future__ import annotations

import os
import threading
from collections import deque
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


class PatientReader(BulkReads):
    """Keeps prefetches until at most one read is outstanding; what it does with reads is a subclass's.

    They begin when somebody asks for completions, later than the native reader's, which needs nobody for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begun = 0
        self._waiting: deque[tuple[Read, int]] = deque()

    def submit(self, read: Read, tag: int, prefetch: bool = False) -> None:
        """See ExpertReader."""
        if prefetch:
            self._waiting.append((read, tag))
            self._begin_prefetches()
        else:
            self._begun += 1
            self._begin(read, tag)

    def withdraw(self) -> list[int]:
        """See ExpertReader."""
        tags = [tag for _, tag in self._waiting]
        self._waiting.clear()
        return tags

    def _completions(self) -> list[tuple[int, str]]:
        return self._ended(self._wait_for_some()) if self._begun else []

    def _completed(self) -> list[tuple[int, str]]:
        return self._ended(self._what_has_ended())

    def _ended(self, done: list[tuple[int, str]]) -> list[tuple[int, str]]:
        self._begun -= len(done)
        self._begin_prefetches()
        return done

    def _begin_prefetches(self) -> None:
        while self._waiting and self._begun <= 1:
            self._begun += 1
            self._begin(*self._waiting.popleft())

    def _begin(self, read: Read, tag: int) -> None:
        raise NotImplementedError

    def _wait_for_some(self) -> list[tuple[int, str]]:
        raise NotImplementedError

    def _what_has_ended(self) -> list[tuple[int, str]]:
        raise NotImplementedError


class ThreadedReader(PatientReader):
    """Implements ExpertReader with `fetch`, called by so many Python threads."""

    def __init__(self, fetch: Callable[[Read], None], threads: int) -> None:
        super().__init__()
        self._fetch = fetch
        self._jobs: SimpleQueue[tuple[Read, int] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, str]] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads; reads in flight finish first."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _begin(self, read: Read, tag: int) -> None:
        self._jobs.put((read, tag))

    def _wait_for_some(self) -> list[tuple[int, str]]:
        return [self._done.get(), *self._what_has_ended()]

    def _what_has_ended(self) -> list[tuple[int, str]]:
        done = []
        while not self._done.empty():
            done.append(self._done.get())
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
