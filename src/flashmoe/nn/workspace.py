"""Scratch arrays that a forward pass writes and forgets."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Workspace:
    """Named buffers, shared by all layers and reused from step to step; each only grows.

    Not thread-safe.  A buffer's content lasts until the next block that asks for the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[Any]] = {}
        self._views: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An uninitialised array of `shape`; the same name must always ask for the same dtype."""
        key = (name, shape)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._make(name, shape, dtype)
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _make(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            # Views of the old buffer would keep it alive beside the new one.
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)
