"""Reading byte ranges.

Plain pread rather than a memory map: a file that shrinks or a failing drive gives an error that names the
file, where a map would kill the process with SIGBUS, and nothing lingers in the resident set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import ReadError

_MAX_READ = 1 << 30  # one pread moves at most 2 GiB - 4 KiB on Linux


def read_exact(path: Path, offset: int, nbytes: int, *, keep_cached: bool = True) -> NDArray[np.uint8]:
    """Bytes offset..offset + nbytes of a file as a fresh writable u8 [nbytes].

    ``keep_cached`` false tells the kernel that the pages will not be read again.  Raises ReadError when the
    file cannot be opened, fails, or ends early.  Thread-safe.
    """
    return _read(path, [offset], nbytes, keep_cached=keep_cached).reshape(-1)


def read_pieces(path: Path, offsets: Sequence[int], nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` bytes at each of ``offsets`` (one or more) as u8 [len(offsets), nbytes]; raises like read_exact."""
    return _read(path, offsets, nbytes, keep_cached=True)


def _read(path: Path, offsets: Sequence[int], nbytes: int, *, keep_cached: bool) -> NDArray[np.uint8]:
    data = np.empty((len(offsets), nbytes), np.uint8)
    at = offsets[0]
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            for row, at in zip(data, offsets, strict=True):
                _fill(fd, row.data, path, at)
            if not keep_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, at, nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError as error:
        raise ReadError(f"reading {path} at byte {at} failed ({error.strerror}): copy it again") from error
    return data


def _fill(fd: int, view: memoryview, path: Path, offset: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _MAX_READ]], offset + done)
        if got == 0:
            raise ReadError(
                f"{path} ends at byte {offset + done}, {offset + len(view)} needed: copy it again"
            )
        done += got
