"""Arrays in .npz files of other people: checked before memory is allocated for them."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError

_MOST_INFLATED = 1032  # bytes of content for a byte of deflate data: its format cannot do more
_MOST_BYTES = 4 << 30  # of all arrays together; a million tokens of 60 layers and 10 experts are 2.4 GB
_MOST_ARRAYS = 64
_KINDS = "biuf"  # what an array may hold: no objects, which would be code


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """name -> array.  Raises TraceError when the file is missing, no .npz, damaged, or larger than it can be."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if len(infos) > _MOST_ARRAYS or sum(info.file_size for info in infos) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_ARRAYS} arrays or {_MOST_BYTES >> 30} GiB")
            return {info.filename.removesuffix(".npy"): _read(archive, info) for info in infos}
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}: give a file of --record-trace") from error
    except _DAMAGE as error:
        raise TraceError(
            f"{path}: no .npz file that we can read ({error}): record or train it again"
        ) from error


# What zipfile, zlib and numpy raise for files that are not what they say.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    SyntaxError,
)


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
        raise ValueError(f"{info.filename}: its compression is unknown")
    if info.file_size > (1 if stored else _MOST_INFLATED) * info.compress_size:
        raise ValueError(f"{info.filename}: {info.file_size} bytes are not in {info.compress_size}")
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        if dtype.kind not in _KINDS:
            raise ValueError(f"{info.filename}: {dtype} is no type of numbers")
        nbytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or nbytes > info.file_size:
            raise ValueError(f"{info.filename}: shape {shape} does not fit {info.file_size} bytes")
        content = file.read(nbytes + 1)
    if len(content) != nbytes:
        raise ValueError(f"{info.filename}: shape {shape} does not fit its content")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the .npy format")
