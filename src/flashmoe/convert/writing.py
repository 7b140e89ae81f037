"""Writing a bundle's files one after another, each resumable: the journal remembers what is done."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from flashmoe.bundle.codecs import U8
from flashmoe.bundle.manifest import JOURNAL_FILE, MANIFEST_FILE, Manifest
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.stripes import (
    LINK_FOLDERS,
    check_count,
    link_directories,
    marks_of,
    take_directories,
    write_mark,
)
from flashmoe.bundle.writer import PartialFile
from flashmoe.convert.journal import Journal, PieceRecord
from flashmoe.convert.units import Piece, Unit
from flashmoe.env import cpu_count
from flashmoe.errors import BundleError
from flashmoe.types import format_size

# At most this much work is lost to a kill; syncing every record would halve the speed of a slow drive.
_SYNC_NBYTES = 64 << 20
_AHEAD_NBYTES = 64 << 20  # larger pieces are made chunk by chunk as they are written, to bound memory
_AHEAD = 4  # pieces in the making at once; each may take some 100 MiB
_SPARE_NBYTES = 16 << 20  # manifest, journal and the file system's own needs


def open_output(dst: Path) -> Journal:
    """The journal of a new or unfinished bundle; raises BundleError when ``dst`` holds anything else."""
    journal = dst / JOURNAL_FILE
    if not journal.exists():
        if (dst / MANIFEST_FILE).exists():
            raise BundleError(f"{dst} is a bundle already: delete it or choose another output directory")
        if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
            raise BundleError(f"{dst} exists and is no unfinished bundle: choose another output directory")
    try:
        dst.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"cannot create {dst} ({error.strerror}): choose another directory") from error
    return Journal(journal)


class Stripes:
    """Directories for the experts of a new bundle; ``links``: their names in it, none when it keeps them itself."""

    def __init__(self, dst: Path, given: Sequence[Path], journal: Journal) -> None:
        """Take the directories, or find that an interrupted run has taken the same ones.  Raises BundleError.

        ``start`` belongs to the journal's beginning; link() comes after it.
        """
        self._dst = dst
        names = [str(directory.absolute()) for directory in given]
        if journal.start is not None and journal.start.get("experts_dirs", []) != names:
            raise BundleError(
                f"{dst} was begun with other --experts-dir: repeat those to go on, or delete it to start afresh"
            )
        self.directories = take_directories(given, begun=journal.start is not None)
        self.links: Sequence[str] = ()
        self.start = {"experts_dirs": names} if names else {}

    def link(self, experts: int) -> None:
        """Make ``links``, for layers of so many experts."""
        check_count(len(self.directories), experts)
        if self.directories:
            self.links = link_directories(self._dst, LINK_FOLDERS[0], self.directories)

    def write_marks(self, manifest: Manifest) -> None:
        """Say in each directory what it holds, before the manifest names it."""
        for mark, directory in zip(marks_of(manifest, len(self.links)), self.directories, strict=True):
            write_mark(directory, mark)


class UnitWriter:
    """Writes units into ``dst``."""

    def __init__(self, dst: Path, journal: Journal, units: Sequence[Unit], progress: Progress | None) -> None:
        self._dst, self._journal, self._units, self._progress = dst, journal, units, progress
        self.total = sum(unit.nbytes for unit in units)
        self._done = 0

    def left(self, unit: Unit) -> int:
        """Bytes of a unit that are not durably written yet."""
        return unit.nbytes - sum(nbytes for nbytes, _ in self._journal.pieces(unit.key))

    def check_space(self, growth: Callable[[Mapping[str, int], Path], int], remedy: str) -> None:
        """Raise BundleError when a drive lacks the bytes by which it will grow, and a few to spare.

        growth: called for each drive with the bytes that are left of each unit on it, and a directory there.
        """
        drives: dict[int, tuple[Path, dict[str, int]]] = {}
        for unit in self._units:
            folder = next(place for place in (self._dst / unit.file).parents if place.exists())
            _, left = drives.setdefault(folder.stat().st_dev, (folder.resolve(), {}))
            left[unit.key] = self.left(unit)
        for folder, left in drives.values():
            needed = growth(left, folder) + _SPARE_NBYTES
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise BundleError(
                    f"{folder} needs {format_size(needed)} more, the drive has"
                    f" {format_size(free)} free: {remedy}"
                )

    def skip_complete(self, unit: Unit) -> bool:
        """True (and counted as done) when the unit's file is there, whole, under its final name."""
        path = self._dst / unit.file
        whole = len(self._journal.pieces(unit.key)) == unit.count
        if whole and path.exists() and path.stat().st_size == unit.nbytes:
            self._advance(unit.nbytes)
            return True
        return False

    def write(self, unit: Unit) -> None:
        """Write the unit's file, going on behind the pieces that an earlier run left."""
        with PartialFile(self._dst / unit.file) as file:
            kept = file.keep(self._journal.pieces(unit.key))
            self._journal.keep(unit.key, kept)
            self._advance(file.offset)
            pending: list[PieceRecord] = []
            for piece, chunks in _made(unit, kept):
                pending.append(self._write_piece(file, piece, chunks))
                if file.unsynced >= _SYNC_NBYTES:
                    file.sync()
                    self._journal.add(unit.key, pending)
                    pending = []
            file.sync()
            self._journal.add(unit.key, pending)
            file.finish()

    def _write_piece(self, file: PartialFile, piece: Piece, chunks: Iterable[U8]) -> PieceRecord:
        start = file.offset
        digest = xxhash.xxh3_64()
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk.reshape(-1).data)
            self._advance(chunk.nbytes)
        written = file.offset - start
        assert written == piece.nbytes, f"{file.path}: {piece.name} has {written} bytes, not {piece.nbytes}"
        return piece.nbytes, digest.hexdigest()

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)


def _made(unit: Unit, first: int) -> Iterator[tuple[Piece, Iterable[U8]]]:
    """The pieces from ``first`` on, in order; small ones are made ahead, one per processor.

    Making is numpy work that releases the interpreter lock; its order changes nothing, each piece has its bytes.
    """
    ahead = min(_AHEAD, cpu_count())
    pool = ThreadPoolExecutor(ahead, "flashmoe-convert")
    try:
        queue: deque[tuple[Piece, Callable[[], Iterable[U8]]]] = deque()
        for index in range(first, unit.count):
            piece = unit.piece(index)
            small = piece.nbytes <= _AHEAD_NBYTES
            queue.append((piece, pool.submit(list, piece.make()).result if small else piece.make))
            if len(queue) > ahead:
                ready, take = queue.popleft()
                yield ready, take()
        for ready, take in queue:
            yield ready, take()
    finally:
        pool.shutdown(cancel_futures=True)
