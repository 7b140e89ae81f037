"""Arrays that kernels pass over from end to end for every token."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import numpy as np
from numpy.typing import NDArray

_HUGE_PAGE = 2 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def zeros_f32(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros, in huge pages where they fill one and the system has them.

    numpy asks for huge pages from 4 MiB on.  A recurrent state of 2 MiB a layer in pages of 4 KiB took a token
    1.4 times as long, most of it table walks.
    """
    nbytes = 4 * prod(shape)
    if _ADVICE is None or nbytes < _HUGE_PAGE:
        return np.zeros(shape, np.float32)
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -np.frombuffer(memory, np.uint8).ctypes.data % _HUGE_PAGE
    with suppress(OSError):  # a kernel that was built without them refuses
        # Whole huge pages only: a partial one at the end would be charged in full.
        memory.madvise(_ADVICE, begin, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return np.frombuffer(memory, np.float32, prod(shape), begin).reshape(shape)
