"""Snapshots of sequences, so that a prompt which begins like an earlier one need not be processed from its start.

A hybrid model's recurrent states cannot be cut back to a shorter text, so a sequence is kept as it was at positions
that later prompts will share: ends of turns and of answers.  A snapshot is found by the hash of exactly its tokens.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashmoe.engine.snapshot import Arrays, copied, load, save
from flashmoe.models.decoder import SequenceState

_SUFFIX = ".prefix"
_WRITES = 2  # snapshots that may wait for the drive; more are not written, only kept in memory


@dataclass(frozen=True)
class _Snapshot:
    """parent: the longest snapshot in memory that this one goes on from, when it came."""

    arrays: Arrays
    parent: _Key | None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class _Key:
    length: int
    digest: str

    @property
    def file_name(self) -> str:
        return f"{self.length}-{self.digest}{_SUFFIX}"


class PrefixCache:
    """Keeps snapshots in memory, and on the drive when a directory is given.

    When memory is short, those go first that exactly one other one goes on from: the conversation has left them behind,
    and no second one has begun there.  Then those used longest ago.

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
        self._held: OrderedDict[_Key, _Snapshot] = OrderedDict()  # least recently used first
        if directory is not None:
            directory = directory / xxhash.xxh3_64_hexdigest(identity.encode())
        self._directory, self._directory_most = directory, directory_nbytes
        self._writes: queue.Queue[_Key | None] = queue.Queue()
        self._unwritten: dict[
            _Key, _Snapshot
        ] = {}  # in memory until they are written, whatever becomes of _held
        self._writer: threading.Thread | None = None
        self.hits = self.misses = 0
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
            self._writer.start()

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, with those that wait for the drive."""
        unwritten = self._unwritten.copy()  # its thread takes some away
        return sum(snapshot.nbytes for snapshot in (self._held | unwritten).values())

    def __len__(self) -> int:
        return len(self._held)

    def longest(self, ids: Sequence[int]) -> int:
        """Tokens of the longest known prefix of `ids`; 0 when none is known."""
        return next((key.length for key in self._candidates(ids)), 0)

    def restore(self, state: SequenceState, ids: Sequence[int]) -> int:
        """Bring a cleared state to the longest known prefix of `ids`; how many tokens that is (0: none is known)."""
        for key in self._candidates(ids):
            snapshot = self._held.get(key)
            if snapshot is None:
                arrays = self._read(key, ids)
            else:
                arrays = snapshot.arrays
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
        views, parent = state.arrays(), self._parent(ids)
        if not self._make_room(sum(view.nbytes for view in views), parent):  # before it is taken
            return
        snapshot = self._held[key] = _Snapshot(copied(views), parent)
        if self._writer is not None and len(self._unwritten) < _WRITES and not self._path(key).exists():
            self._unwritten[key] = snapshot
            self._writes.put(key)

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writes.put(None)
            self._writer.join()
            self._writer = None

    def _candidates(self, ids: Sequence[int]) -> Iterator[_Key]:
        """Snapshots that are a prefix of `ids`, the longest first."""
        names = {path.name for path in self._files()}
        lengths = {key.length for key in self._held} | {int(name.split("-")[0]) for name in names}
        tokens = np.asarray(ids, np.int32)
        for length in sorted((n for n in lengths if n <= len(ids)), reverse=True):
            key = _Key(length, _digest(tokens[:length]))
            if key in self._held or key.file_name in names:
                yield key

    def _parent(self, ids: Sequence[int]) -> _Key | None:
        return next(
            (key for key in self._candidates(ids) if key in self._held and key.length < len(ids)), None
        )

    def _make_room(self, nbytes: int, parent: _Key | None) -> bool:
        """Let others go until that much more fits; False when it cannot.  parent: of the one that comes."""
        if nbytes > self._most:
            return False
        while self.nbytes + nbytes > self._most:
            gone = self._least_useful(parent)
            if gone is None:  # the drive is slow, and its thread holds the rest
                return False
            del self._held[gone]
        return True

    def _least_useful(self, parent: _Key | None) -> _Key | None:
        children = Counter(snapshot.parent for snapshot in self._held.values())
        children[parent] += 1
        behind = (key for key in self._held if children[key] == 1)
        return next(behind, next(iter(self._held), None))

    def _path(self, key: _Key) -> Path:
        assert self._directory is not None
        return self._directory / key.file_name

    def _files(self) -> list[Path]:
        if self._directory is None:
            return []
        return [path for path in self._directory.glob(f"*-*{_SUFFIX}") if path.name.split("-")[0].isdecimal()]

    def _read(self, key: _Key, ids: Sequence[int]) -> Arrays | None:
        """A snapshot from the drive, and into memory; None if there is no room.  A file that is no good goes."""
        if self._directory is None:
            return None
        path, parent = self._path(key), self._parent(ids[: key.length])
        try:
            if not self._make_room(path.stat().st_size, parent):
                return None
            arrays = load(path, self._identity, self._most)
            os.utime(path)  # files go by their time of last use
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # whatever a header can be
            path.unlink(missing_ok=True)
            return None
        self._held[key] = _Snapshot(arrays, parent)
        return arrays

    def _write_all(self) -> None:
        while (key := self._writes.get()) is not None:
            partial = self._path(key).with_suffix(".partial")
            try:
                save(partial, self._identity, self._unwritten[key].arrays)
                self._trim(partial.stat().st_size)
                partial.rename(self._path(key))
            except OSError:  # a full drive costs the snapshot, not the answer
                partial.unlink(missing_ok=True)
            del self._unwritten[key]

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


def _digest(ids: Sequence[int] | NDArray[np.int32]) -> str:
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
