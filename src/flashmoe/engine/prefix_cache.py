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

from flashmoe.engine.snapshot import Arrays, Pieces, copied, load, save
from flashmoe.kernels.kv_cache import POSITIONS
from flashmoe.models.decoder import SequenceState

_SUFFIX = ".prefix"
_WRITES = 2  # snapshots that may wait for the drive; more are not written, only kept in memory
# Snapshots that share blocks; the next one has all of its own, so that restoring stays one pass.
_LONGEST_CHAIN = 16


@dataclass(frozen=True, eq=False)
class _Memory:
    """What is taken and given back together."""

    nbytes: int


@dataclass(frozen=True)
class _Snapshot:
    """blocks: memory of the growing arrays, shared with snapshots that this one goes on from; rest: of the others.

    parent: the longest snapshot in memory that this one goes on from, when it came.
    """

    pieces: Pieces
    blocks: tuple[_Memory, ...]
    rest: _Memory
    parent: _Key | None


@dataclass(frozen=True)
class _Key:
    length: int
    digest: str

    @property
    def file_name(self) -> str:
        return f"{self.length}-{self.digest}{_SUFFIX}"


class PrefixCache:
    """Keeps snapshots in memory, and on the drive when a directory is given.

    A snapshot shares full blocks of keys and values with the one that it goes on from: a turn costs what it adds.
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
        return self._nbytes_with(())

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
                pieces = self._read(key, ids)
            else:
                pieces = snapshot.pieces
                self._held.move_to_end(key)
            if pieces is not None and _restore(state, key.length, pieces):
                self.hits += 1
                return key.length
            self._held.pop(key, None)  # a file of another shape
        self.misses += 1
        return 0

    def store(self, ids: Sequence[int], state: SequenceState) -> None:
        """Keep the state that `ids` have led to, if there is room for it."""
        key = _Key(len(ids), _digest(ids))
        if key in self._held:
            self._held.move_to_end(key)
            return
        views, growing, parent = state.arrays(), state.growing(), self._parent(ids)
        before, full, shared = self._shared(parent, growing)
        added = [view[:, full:] for view, grows in zip(views, growing, strict=True) if grows]
        others = [view for view, grows in zip(views, growing, strict=True) if not grows]
        blocks, rest = (_Memory(sum(view.nbytes for view in part)) for part in (added, others))
        if not self._make_room(blocks.nbytes + rest.nbytes, parent, before):  # before it is taken
            return
        copies = {True: iter(copied(added)), False: iter(copied(others))}  # one can go without the other
        pieces = [[*part, next(copies[grows])] for part, grows in zip(shared, growing, strict=True)]
        snapshot = self._held[key] = _Snapshot(pieces, (*before, blocks), rest, parent)
        if self._writer is not None and len(self._unwritten) < _WRITES and not self._path(key).exists():
            self._unwritten[key] = snapshot
            self._writes.put(key)

    def _shared(
        self, parent: _Key | None, growing: Sequence[bool]
    ) -> tuple[tuple[_Memory, ...], int, Pieces]:
        """What a snapshot that goes on from `parent` need not copy: its memory, blocks, and them of each array."""
        if parent is None or len(self._held[parent].blocks) >= _LONGEST_CHAIN:
            return (), 0, [[] for _ in growing]
        base = self._held[parent]
        full = parent.length // POSITIONS
        parts = zip(base.pieces, growing, strict=True)
        return base.blocks, full, [_first(pieces, full if grows else 0) for pieces, grows in parts]

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

    def _nbytes_with(self, kept: Sequence[_Memory]) -> int:
        """Bytes held, with those that wait for the drive and with `kept`."""
        unwritten = self._unwritten.copy()  # its thread takes some away
        memory = {id(one): one.nbytes for one in kept}
        for snapshot in (*self._held.values(), *unwritten.values()):
            memory |= {id(one): one.nbytes for one in (*snapshot.blocks, snapshot.rest)}
        return sum(memory.values())

    def _make_room(self, nbytes: int, parent: _Key | None, kept: Sequence[_Memory] = ()) -> bool:
        """Let others go until that much more fits beside `kept`; False when it cannot.

        parent, kept: of the one that comes, and what it shares.
        """
        if nbytes > self._most:
            return False
        while self._nbytes_with(kept) + nbytes > self._most:
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

    def _read(self, key: _Key, ids: Sequence[int]) -> Pieces | None:
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
        pieces, memory = [[array] for array in arrays], _Memory(sum(array.nbytes for array in arrays))
        self._held[key] = _Snapshot(pieces, (memory,), _Memory(0), parent)
        return pieces

    def _write_all(self) -> None:
        while (key := self._writes.get()) is not None:
            partial = self._path(key).with_suffix(".partial")
            try:
                save(partial, self._identity, self._unwritten[key].pieces)
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


def _first(pieces: Arrays, entries: int) -> Arrays:
    """The first entries along the second axis."""
    first = Arrays()
    for piece in pieces:
        if entries <= 0:
            break
        first.append(piece[:, :entries])
        entries -= piece.shape[1]
    return first


def _restore(state: SequenceState, length: int, snapshot: Pieces) -> bool:
    """False, with the state cleared, when the snapshot is of another shape."""
    state.position = length
    mine = [(array.shape, array.dtype) for array in state.arrays()]
    if mine != [(_joined_shape(pieces), pieces[0].dtype) for pieces in snapshot]:
        state.clear()
        return False
    state.restore(length, snapshot)
    return True


def _joined_shape(pieces: Arrays) -> tuple[int, ...]:
    first = pieces[0].shape
    if len(pieces) == 1:
        return first
    return (first[0], sum(piece.shape[1] for piece in pieces), *first[2:])
