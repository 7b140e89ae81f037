"""Writing a bundle's files: durable, resumable, and under their final name only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from flashmoe.bundle.codecs import U8, align_up
from flashmoe.bundle.manifest import MANIFEST_FILE, TENSOR_ALIGN, Manifest
from flashmoe.errors import BundleError

PARTIAL = ".partial"
DATA_ALIGN = 4096
PAD_PREFIX = "__pad."
_HASH_CHUNK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor to be placed in resident.safetensors; ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ResidentLayout:
    """The header bytes of resident.safetensors and its tensors, pads included, back to back after them."""

    header: bytes
    entries: Sequence[Entry]
    nbytes: int


def resident_layout(entries: Sequence[Entry], page_aligned: str | None) -> ResidentLayout:
    """Place tensors in the given order at 64-byte offsets, the one named ``page_aligned`` at a 4096-byte one.

    Gaps become tensors of their own (``__pad.N``), because safetensors allows none; the file ends on a
    4096-byte boundary so that direct reads may round up.
    """
    placed: list[Entry] = []
    offset = 0
    for entry in entries:
        offset = _pad(placed, offset, DATA_ALIGN if entry.name == page_aligned else TENSOR_ALIGN)
        placed.append(entry)
        offset += entry.nbytes
    offset = _pad(placed, offset, DATA_ALIGN)
    header = _header_bytes(placed)
    return ResidentLayout(header, placed, len(header) + offset)


class PartialFile:
    """A file written front to back under ``NAME.partial`` and renamed when complete.  One writer at a time.

    Every failure of the system is a BundleError that names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + PARTIAL)
        with _Naming(self._temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT, 0o644)
        self.offset = 0
        self.unsynced = 0

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def keep(self, pieces: Sequence[tuple[int, str]]) -> int:
        """Trust the leading (nbytes, xxh3) pieces that are really there, cut off the rest; how many were."""
        count = 0
        for nbytes, digest in pieces:
            if self._hash(self.offset, nbytes) != digest:
                break
            self.offset += nbytes
            count += 1
        with _Naming(self._temporary):
            os.ftruncate(self._fd, self.offset)
            os.lseek(self._fd, self.offset, os.SEEK_SET)
        return count

    def write(self, data: U8) -> None:
        """Append bytes."""
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        with _Naming(self._temporary):
            while view:
                done = os.write(self._fd, view)
                view = view[done:]
                self.offset += done
                self.unsynced += done

    def sync(self) -> None:
        """Wait until everything written is on the drive."""
        with _Naming(self._temporary):
            os.fdatasync(self._fd)
            if hasattr(os, "posix_fadvise"):  # it will not be read again soon: leave the page cache to others
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.unsynced = 0

    def finish(self) -> None:
        """Make the file durable under its final name."""
        self.sync()
        with _Naming(self.path):
            os.rename(self._temporary, self.path)
            sync_folder(self.path.parent)

    def _hash(self, offset: int, nbytes: int) -> str:
        digest = xxhash.xxh3_64()
        for start in range(offset, offset + nbytes, _HASH_CHUNK):
            with _Naming(self._temporary):
                digest.update(os.pread(self._fd, min(_HASH_CHUNK, offset + nbytes - start), start))
        return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a bundle: with it the folder becomes one, all at once."""
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest.to_json(), indent=1).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file durably: it has its old content or the new, never a part."""
    with PartialFile(path) as file:
        file.keep([])
        file.write(np.frombuffer(data, np.uint8))
        file.finish()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Naming:
    """Turns an OSError into a BundleError that names the file and, when the drive is full, the way out."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise BundleError(
                f"writing {self._path} failed ({error.strerror}): free some space or fix the drive,"
                " then run the same command again to go on where it stopped"
            ) from error


def _pad(placed: list[Entry], offset: int, align: int) -> int:
    gap = align_up(offset, align) - offset
    if gap:
        placed.append(Entry(f"{PAD_PREFIX}{len(placed)}", "U8", (gap,), gap))
    return offset + gap


def _header_bytes(entries: Sequence[Entry]) -> bytes:
    """Length and JSON, the JSON followed by spaces up to a 4096-byte boundary."""
    text = json.dumps(dict(_header_items(entries)), separators=(",", ":")).encode()
    size = align_up(8 + len(text), DATA_ALIGN) - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def _header_items(entries: Sequence[Entry]) -> Iterator[tuple[str, object]]:
    yield "__metadata__", {"format": "flashmoe-bundle"}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.nbytes]
        yield entry.name, {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.nbytes
