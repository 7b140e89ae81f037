"""Arrays that kernels pass over from end to end for every token."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from flashmoe._native import AlignedBuffer


def zeros_f32(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros, in huge pages where 2 MiB of them are whole.

    numpy asks for huge pages from 4 MiB on.  A recurrent state of 2 MiB a layer in pages of 4 KiB took a token
    1.4 times as long, most of it table walks.
    """
    buffer = AlignedBuffer(max(prod(shape), 1) * 4, True)
    zeros: NDArray[np.float32] = buffer.array()[: prod(shape) * 4].view(np.float32).reshape(shape)
    return zeros
