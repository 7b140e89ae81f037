"""The header of a GGUF file: metadata, and the tensors' types, shapes and byte ranges, checked before use.

Source: the GGUF specification, versions 2 and 3 (little-endian).
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flashmoe.checkpoint.gguf.types import BLOCKS, TYPE_NAMES
from flashmoe.checkpoint.header import Header, TensorEntry, check_overlap
from flashmoe.errors import CheckpointError

MAGIC = b"GGUF"
_MAX_NAME = 1 << 16
_MAX_TEXT = 16 << 20  # one metadata string: chat templates have 20 kB
# All strings of the header: the largest vocabularies have 262,144 tokens and twice as many merges, 15 MB.
_MAX_STRINGS, _MAX_STRING_NBYTES = 1 << 21, 128 << 20
_MAX_ARRAY_NBYTES = 64 << 20
_MAX_KEYS, _MAX_TENSORS, _MAX_DIMS = 1 << 16, 1 << 20, 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class GgufHeader:
    """``metadata``: int, float, bool, str, list[str] or numpy array by key; ``tensors`` as for safetensors.

    A tensor's shape has its outermost dimension first, as in safetensors.
    """

    metadata: dict[str, Any]
    tensors: Header


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises CheckpointError (one line, names the file) when the file is missing, truncated, of another version or
    byte order, or places a tensor outside the file or on top of another.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check the path and download it again"
        ) from error


class _Reader:
    """Takes values off a file, never more than it has nor more than a header can need."""

    def __init__(self, path: Path, file: BinaryIO, nbytes: int) -> None:
        self._path, self._file, self._nbytes = path, file, nbytes
        self._at = self._strings = self._string_nbytes = self._array_nbytes = 0

    def header(self) -> GgufHeader:
        version = self._version()
        count, keys = self._number("<Q"), self._number("<Q")
        if count > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._damaged(f"it claims {count} tensors and {keys} keys")
        metadata: dict[str, Any] = {"GGUF.version": version}
        for _ in range(keys):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise self._damaged(f"the key {key!r} appears twice")
            metadata[key] = self._value(key, self._number("<I"))
        rows = [self._tensor() for _ in range(count)]
        return GgufHeader(metadata, Header(self._placed(rows, metadata), {}, self._nbytes))

    def _version(self) -> int:
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{self._path} is no GGUF file: give a model in GGUF or safetensors")
        version = self._number("<I")
        if version not in (2, 3):
            kind = "big-endian" if version >= 1 << 16 else f"version {version}"
            raise CheckpointError(
                f"{self._path} is a {kind} GGUF file: flashmoe reads versions 2 and 3, little-endian"
            )
        return version

    def _take(self, nbytes: int) -> bytes:
        if nbytes > self._nbytes - self._at:
            raise self._damaged(f"it ends inside its header, at byte {self._nbytes}")
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise self._damaged("it became shorter while it was read")
        self._at += nbytes
        return data

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _string(self, most: int = _MAX_TEXT) -> str:
        nbytes = self._number("<Q")
        self._strings += 1
        self._string_nbytes += nbytes
        if nbytes > most or self._strings > _MAX_STRINGS or self._string_nbytes > _MAX_STRING_NBYTES:
            raise self._damaged(f"a text of {nbytes} bytes is no part of a header")
        return self._take(nbytes).decode("utf-8", "replace")

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._damaged(f"the value of {key!r} has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            if count > _MAX_STRINGS or 8 * count > self._nbytes - self._at:
                raise self._damaged(f"{key!r} claims {count} texts")
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"{key!r} is a list of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self._array_nbytes += count * dtype.itemsize
        if self._array_nbytes > _MAX_ARRAY_NBYTES:
            raise self._damaged(f"{key!r} claims {count} values")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        """(name, shape, type, offset from the start of the data)."""
        name, dims = self._string(_MAX_NAME), self._number("<I")
        if dims > _MAX_DIMS:
            raise self._damaged(f"{name!r} has {dims} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in TYPE_NAMES:
            raise CheckpointError(
                f"{self._path}: tensor {reprlib.repr(name)} has the type {kind}, which flashmoe does not know"
            )
        return name, shape, TYPE_NAMES[kind], offset

    def _placed(
        self, rows: list[tuple[str, tuple[int, ...], str, int]], metadata: dict[str, Any]
    ) -> dict[str, TensorEntry]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"its general.alignment is {reprlib.repr(alignment)}")
        start = -(-self._at // alignment) * alignment
        entries: dict[str, TensorEntry] = {}
        for name, shape, dtype, offset in rows:
            per_block, block_nbytes = BLOCKS[dtype]
            count = math.prod(shape)
            nbytes = count // per_block * block_nbytes
            if (shape[-1] if shape else 1) % per_block or start + offset + nbytes > self._nbytes:
                raise self._damaged(
                    f"{name!r} {dtype} {list(shape)} does not fit at byte {start + offset} of {self._nbytes}"
                )
            if name in entries:
                raise self._damaged(f"the tensor {name!r} appears twice")
            entries[name] = TensorEntry(name, dtype, shape, start + offset, nbytes)
        check_overlap(self._path, entries)
        return entries

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {reason}; download it again")
