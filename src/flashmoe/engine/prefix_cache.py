"""Snapshots of sequences, so that a prompt which begins like an earlier one need not be processed from its start.

A hybrid model's recurrent states cannot be cut back to a shorter text, so a sequence is kept as it was at positions
that later prompts will share: ends of turns.  A snapshot is found by the hash of exactly its tokens.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from flashmoe.engine.snapshot import Arrays, copied, load, save
from flashmoe.models.qwen3_5_moe import SequenceState

_SUFFIX = ".prefix"
_WRITES = 2  # snapshots that may wait for the drive; more are not written, only kept in memory


@dataclass(frozen=True)
class _Key:
    length: int
    digest: str

    @property
    def file_name(self) -> str:
        return f"{self.length}-{self.digest}{_SUFFIX}"


class PrefixCache:
    """Keeps the most recently used snapshots in memory, and on the drive when a directory is given.

    Used by one thread; a thread of its own writes files.  A damaged file, or one of another bundle or configuration, is
    not used and gives way to others.
    """

    def __init__(
        self, nbytes: int, identity: str, directory: Path | None = None, directory_nbytes: int = 0
    ) -> None:
        """nbytes: most to hold in memory; identity: of all that determines a state's bits, apart from the tokens.

        directory_nbytes: most that the files of this identity may take together; they have a folder of their own.
        Raises OSError when it cannot be made.
        """
        self._most, self._identity = nbytes, identity
        self._held: OrderedDict[_Key, Arrays] = OrderedDict()  # least recently used first
        self._held_nbytes = 0
        if directory is not None:
            directory = directory / xxhash.xxh3_64_hexdigest(identity.encode())
        self._directory, self._directory_most = directory, directory_nbytes
        self._writes: queue.Queue[tuple[_Key, Arrays] | None] = queue.Queue(_WRITES)
        self._writer: threading.Thread | None = None
        self.hits = self.misses = 0
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
            self._writer.start()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._held_nbytes

    def __len__(self) -> int:
        return len(self._held)

    def restore(self, state: SequenceState, ids: Sequence[int]) -> int:
        """Bring a cleared state to the longest known prefix of `ids`; how many tokens that is (0: none is known)."""
        for key in self._candidates(ids):
            arrays = self._held.get(key)
            if arrays is None:
                arrays = self._read(key)
            else:
                self._held.move_to_end(key)
            if arrays is not None and _restore(state, key.length, arrays):
                self.hits += 1
                return key.length
        self.misses += 1
        return 0

    def store(self, ids: Sequence[int], state: SequenceState) -> None:
        """Keep the state that `ids` have led to, if there is room for it."""
        key = _Key(len(ids), _digest(ids))
        if key in self._held:
            self._held.move_to_end(key)
            return
        views = state.arrays()
        size = sum(view.nbytes for view in views)
        if size > self._most:
            return
        self._make_room(size)  # before it is taken
        arrays = copied(views)
        self._hold(key, arrays)
        if self._writer is not None and not self._writes.full() and not self._path(key).exists():
            self._writes.put((key, arrays))

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writes.put(None)
            self._writer.join()
            self._writer = None

    def _candidates(self, ids: Sequence[int]) -> list[_Key]:
        """Snapshots that may be a prefix of `ids`, the longest first."""
        lengths = {key.length for key in self._held}
        on_drive = self._files()
        lengths.update(int(path.name.split("-")[0]) for path in on_drive)
        names = {path.name for path in on_drive}
        found = []
        for length in sorted((n for n in lengths if n <= len(ids)), reverse=True):
            key = _Key(length, _digest(ids[:length]))
            if key in self._held or key.file_name in names:
                found.append(key)
        return found

    def _hold(self, key: _Key, arrays: Arrays) -> None:
        self._held[key] = arrays
        self._held_nbytes += sum(array.nbytes for array in arrays)

    def _make_room(self, nbytes: int) -> None:
        while self._held and self._held_nbytes + nbytes > self._most:
            _, arrays = self._held.popitem(last=False)
            self._held_nbytes -= sum(array.nbytes for array in arrays)

    def _path(self, key: _Key) -> Path:
        assert self._directory is not None
        return self._directory / key.file_name

    def _files(self) -> list[Path]:
        if self._directory is None:
            return []
        return [path for path in self._directory.glob(f"*-*{_SUFFIX}") if path.name.split("-")[0].isdecimal()]

    def _read(self, key: _Key) -> Arrays | None:
        """A snapshot from the drive, and into memory if there is room; None, and no file any more, if it is no good."""
        if self._directory is None:
            return None
        path = self._path(key)
        try:
            arrays = load(path, self._identity, self._most)
            os.utime(path)  # files go by their time of last use
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # whatever a header can be
            path.unlink(missing_ok=True)
            return None
        self._make_room(sum(array.nbytes for array in arrays))
        self._hold(key, arrays)
        return arrays

    def _write_all(self) -> None:
        while (item := self._writes.get()) is not None:
            key, arrays = item
            partial = self._path(key).with_suffix(".partial")
            try:
                save(partial, self._identity, arrays)
                self._trim(partial.stat().st_size)
                partial.rename(self._path(key))
            except OSError:  # a full drive costs the snapshot, not the answer
                partial.unlink(missing_ok=True)

    def _trim(self, more: int) -> None:
        """Delete the files used longest ago until `more` bytes fit."""
        files = sorted(((path.stat(), path) for path in self._files()), key=lambda item: item[0].st_mtime)
        total = sum(info.st_size for info, _ in files)
        for info, path in files:
            if total + more <= self._directory_most:
                return
            path.unlink(missing_ok=True)
            total -= info.st_size
        if total + more > self._directory_most:
            raise OSError(f"a snapshot of {more} bytes is larger than the directory may become")


def _digest(ids: Sequence[int]) -> str:
    return xxhash.xxh3_128_hexdigest(np.asarray(ids, np.int32).tobytes())


def _restore(state: SequenceState, length: int, arrays: Arrays) -> bool:
    """False, with the state cleared, when the snapshot is of another shape."""
    state.position = length
    mine = state.arrays()
    if [(a.shape, a.dtype) for a in mine] != [(a.shape, a.dtype) for a in arrays]:
        state.clear()
        return False
    state.restore(length, arrays)
    return True
