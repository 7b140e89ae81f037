"""A sequence as it was: copies of its arrays, in memory of their own and in a file."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

_MAGIC = b"flashmoe-prefix1"
_HEAD = len(_MAGIC) + 8  # magic, then the bytes of the JSON header, little-endian
_MAX_HEADER = 1 << 20
_LINE = 64  # arrays begin at cache lines

Arrays = list[NDArray[Any]]
Pieces = list[Arrays]  # of each array, one after the other along its second axis


def copied(views: Sequence[NDArray[Any]]) -> Arrays:
    """Copies of the arrays."""
    arrays = _blank([(view.shape, view.dtype) for view in views])
    for array, view in zip(arrays, views, strict=True):
        array[...] = view
    return arrays


def save(path: Path, identity: str, snapshot: Pieces) -> None:
    """Write a snapshot and have it reach the drive; arrays are joined one at a time.  Raises OSError."""
    entries = [
        {"dtype": array.dtype.str, "shape": array.shape, "xxh3": xxhash.xxh3_64_hexdigest(_bytes(array))}
        for array in map(_joined, snapshot)
    ]
    header = json.dumps({"identity": identity, "arrays": entries}).encode()
    with path.open("wb") as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for array in map(_joined, snapshot):
            file.write(_bytes(array))
        file.flush()
        os.fsync(file.fileno())


def load(path: Path, identity: str, most: int) -> Arrays:
    """Read a snapshot.

    Raises OSError, or ValueError, KeyError, TypeError or RecursionError for anything that is not a whole snapshot of
    this identity, of at most `most` bytes.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
        size = int.from_bytes(head[len(_MAGIC) :], "little")
        if head[: len(_MAGIC)] != _MAGIC or size > _MAX_HEADER:
            raise ValueError("no snapshot")
        header = json.loads(file.read(size))
        if not isinstance(header, dict) or header.get("identity") != identity:
            raise ValueError("of another bundle")
        left = path.stat().st_size - _HEAD - size
        if left > most:
            raise ValueError("larger than the cache")
        shapes = [(tuple(entry["shape"]), _dtype(entry["dtype"])) for entry in header["arrays"]]
        if not _fit(shapes, left):
            raise ValueError("cut short")
        arrays = _blank(shapes)
        for array, entry in zip(arrays, header["arrays"], strict=True):
            if file.readinto(_bytes(array)) != array.nbytes:
                raise ValueError("cut short")
            if xxhash.xxh3_64_hexdigest(_bytes(array)) != entry["xxh3"]:
                raise ValueError("damaged")
    return arrays


def _joined(pieces: Arrays) -> NDArray[Any]:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


def _blank(shapes: Sequence[tuple[tuple[int, ...], DTypeLike]]) -> Arrays:
    """Zeros, all arrays in one mapping.

    On the heap, snapshots of a few megabytes each, all of different sizes, would leave holes: 10 MiB a minute with 32
    clients (docs/experiments.md, 24 November).  A mapping goes back to the system with its last array.
    """
    sizes = [int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize for shape, dtype in shapes]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _LINE) * _LINE)
    memory = mmap.mmap(-1, max(starts[-1], 1))
    return [
        np.ndarray(shape, dtype, memory, start)
        for (shape, dtype), start in zip(shapes, starts[:-1], strict=True)
    ]


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.hasobject:
        raise ValueError("no numbers")
    return dtype


def _fit(shapes: Sequence[tuple[tuple[Any, ...], np.dtype[Any]]], left: int) -> bool:
    """Whether the sizes in a header are those of bytes that the file has."""
    total = 0
    for shape, dtype in shapes:
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            return False
        total += int(np.prod(shape, dtype=object)) * dtype.itemsize
    return total <= left
