"""What an experiment takes beside the budget: pages of its files that the operating system keeps."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import env


def cached_nbytes(paths: Iterable[Path]) -> int | None:
    """Bytes of these files in the page cache, whoever brought them there (mincore).

    None where the system does not tell: it has no mincore, or tells it only to those who may write the file.
    """
    total = 0
    for path in paths:
        pages = _resident_pages(path)
        if pages is None:
            return None
        total += pages * mmap.PAGESIZE
    return total


def drop_cached(paths: Iterable[Path]) -> None:
    """Drop the pages of these files from the page cache, where the system lets us; mapped ones stay."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_nbytes() -> int:
    """Memory of this process now without pages of files (elsewhere than on Linux with them)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return env.current_memory()


def drive_nbytes() -> int | None:
    """Bytes that this process had read from drives so far, page faults and read-ahead included; None: not told."""
    counters = Path("/proc/self/io")
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _resident_pages(path: Path) -> int | None:
    library: Any = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mincore") or not os.access(path, os.W_OK):
        return None
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = np.frombuffer(mapping, np.uint8)
    state = np.empty(-(-view.size // mmap.PAGESIZE), np.uint8)
    failed = library.mincore(
        ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size), ctypes.c_void_p(state.ctypes.data)
    )
    return None if failed else int((state & 1).sum())
