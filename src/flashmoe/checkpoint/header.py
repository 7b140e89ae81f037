"""The safetensors header: names, types, shapes and byte ranges, checked against the file before use."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from flashmoe.errors import CheckpointError

DTYPE_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the limit of the official reader
_MAX_DIMS, _MAX_DIM = (
    16,
    1 << 48,
)  # products of more and larger ones take hours, of tensors that cannot be there


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All tensors of a file by name, its metadata, and where its data ends."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    file_nbytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises CheckpointError (one line, names the file) when the file is missing, truncated, or its header is
    not JSON, repeats a name, or places a tensor outside the file or on top of another.
    """
    try:
        with path.open("rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_nbytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_nbytes <= min(file_nbytes - 8, _MAX_HEADER):
                raise _damaged(path, f"its header claims {header_nbytes} bytes of a {file_nbytes}-byte file")
            text = file.read(header_nbytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check the path and download it again"
        ) from error
    return parse_header(path, text, file_nbytes)


def parse_header(path: Path, text: bytes, file_nbytes: int) -> Header:
    """Check the header bytes ``text`` of a file of ``file_nbytes`` bytes; raises like read_header."""
    try:
        table = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(table, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its __metadata__ is no JSON object")
    start = 8 + len(text)
    tensors = {name: _entry(path, name, value, start, file_nbytes) for name, value in table.items()}
    check_overlap(path, tensors)
    return Header(tensors, {k: v for k, v in metadata.items() if isinstance(v, str)}, file_nbytes)


def _entry(path: Path, name: str, value: Any, start: int, file_nbytes: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise _damaged(path, f"the entry of {name!r} is no JSON object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_NBYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the type {reprlib.repr(dtype)}, which flashmoe does not read"
        )
    if not _is_int_list(shape) or not _is_int_list(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape or the offsets of {name!r} are not lists of integers")
    begin, end = offsets
    if len(shape) > _MAX_DIMS or any(size > _MAX_DIM for size in shape):
        raise _damaged(path, f"{name!r} has the shape {reprlib.repr(shape)}")
    nbytes = math.prod(shape) * DTYPE_NBYTES[dtype]
    if begin > end or start + end > file_nbytes or end - begin != nbytes:
        raise _damaged(path, f"{name!r} {dtype} {shape} does not fit bytes {begin}..{end} of the data")
    return TensorEntry(name, dtype, tuple(shape), start + begin, nbytes)


def check_overlap(path: Path, tensors: dict[str, TensorEntry]) -> None:
    """Raise CheckpointError when two tensors share a byte."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset < end:
            raise _damaged(path, f"{entry.name!r} overlaps the tensor before it")
        end = entry.offset + entry.nbytes


def _is_int_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}; download it again")
