"""Compressed records: fewer bytes to read, and a decompression after each read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.bench.experiments.base import Variant, exchange, reader_paths
from flashmoe.bench.experiments.threaded import Files, ThreadedReader, target
from flashmoe.bundle.codecs import U8
from flashmoe.checkpoint.pread import read_exact
from flashmoe.engine.loading import QUEUE_DEPTH, Parts
from flashmoe.env import cpu_count
from flashmoe.store.reader import AlignedBuffer, Read

# codec -> the package that has it
PACKAGES = {"lz4": "lz4", "zstd": "zstandard"}

_BLOCK = 4096  # of direct reads: compressed records start and end at its multiples
_INDEX, _RECORDS = "index.json", "records.bin"
_TIMED = 16  # records whose decompression alone is timed

Place = tuple[int, int, int]  # (file index, offset, bytes) of a record


@dataclass(frozen=True)
class Codec:
    """compress(bytes) and decompress(bytes, size); both release the interpreter's lock."""

    compress: Callable[[Any], bytes]
    decompress: Callable[[Any, int], bytes]


def open_codec(name: str) -> Codec:
    """lz4's block format at its fastest, or zstd at its default level 3.  Raises ImportError."""
    if name == "lz4":
        block = import_module("lz4.block")
        return Codec(
            lambda data: block.compress(data, store_size=False),
            lambda data, nbytes: block.decompress(data, uncompressed_size=nbytes),
        )
    zstandard, local = import_module("zstandard"), threading.local()  # a context serves one thread

    def context(kind: str) -> Any:
        if not hasattr(local, kind):
            setattr(local, kind, getattr(zstandard, kind)())
        return getattr(local, kind)

    return Codec(
        lambda data: context("ZstdCompressor").compress(data),
        lambda data, nbytes: context("ZstdDecompressor").decompress(data, max_output_size=nbytes),
    )


def write_copy(paths: list[Path], places: Iterable[Place], name: str, folder: Path) -> None:
    """Write these records compressed into `folder`, with an index.  Raises ReadError, OSError, ImportError."""
    codec, index = open_codec(name), []
    wanted = sorted(set(places))

    def compress(place: Place) -> bytes:
        return codec.compress(read_exact(paths[place[0]], place[1], place[2]))

    at = 0
    with (folder / _RECORDS).open("wb") as out, ThreadPoolExecutor(cpu_count()) as pool:
        for begin in range(0, len(wanted), 64):  # so many at a time: results wait in memory
            group = wanted[begin : begin + 64]
            for place, data in zip(group, pool.map(compress, group), strict=True):
                room = -(-len(data) // _BLOCK) * _BLOCK
                out.write(data)
                out.write(bytes(room - len(data)))
                index.append((place, at, len(data)))
                at += room
        out.flush()
    (folder / _INDEX).write_text(json.dumps({"codec": name, "records": index}))


class CompressedRecords:
    """Reads records from the compressed copy; what the copy lacks (a wrong guess) is read as it is."""

    def __init__(self, parts: Parts, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text())
        self._codec = open_codec(index["codec"])
        self._places = {tuple(place): (at, nbytes) for place, at, nbytes in index["records"]}
        direct = parts.reader.mode == "direct"
        self._files = Files([*reader_paths(parts), folder / _RECORDS], direct)
        self._copy = len(reader_paths(parts))
        longest = max(nbytes for _, nbytes in self._places.values())
        self._room, self._local = -(-longest // _BLOCK) * _BLOCK, threading.local()
        self._rate = self._decompression_rate()
        self._reader = ThreadedReader(self._fetch, QUEUE_DEPTH)
        exchange(parts, reader=self._reader)

    def note(self) -> str:
        """See Variant."""
        whole = sum(place[2] for place in self._places)
        small = sum(nbytes for _, nbytes in self._places.values())
        return f"size {small / whole:.3f}, decompresses {self._rate / 1e9:.2f} GB/s a core"

    def close(self) -> None:
        """See Variant."""
        self._reader.close()
        self._files.close()

    def _fetch(self, read: Read) -> None:
        place = self._places.get(read[:3])
        if place is None:
            self._files.fetch(read)
            return
        out = target(read)
        out[:] = np.frombuffer(self._codec.decompress(self._load(*place).data, len(out)), np.uint8)

    def _load(self, at: int, nbytes: int) -> U8:
        """A compressed record, in memory of the calling thread."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = AlignedBuffer(self._room, False)
        room: U8 = self._local.buffer.array()
        self._files.read(self._copy, at, room[: -(-nbytes // _BLOCK) * _BLOCK])
        return room[:nbytes]

    def _decompression_rate(self) -> float:
        """Bytes of records per second, one thread, nothing else running."""
        done, seconds = 0, 0.0
        for place, (at, nbytes) in list(self._places.items())[:_TIMED]:
            data = self._load(at, nbytes).data
            began = time.perf_counter()
            done += len(self._codec.decompress(data, place[2]))
            seconds += time.perf_counter() - began
        return done / seconds


def install(parts: Parts, setting: str, scratch: Path | None) -> Variant:
    """setting: the codec; scratch: the folder with the copy that write_copy() made of the records to be read."""
    assert scratch is not None
    return CompressedRecords(parts, scratch)
