"""What a block needs of its surroundings: weights by name."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


class Weights(Protocol):
    """Resident weights of an opened bundle, bound to a backend.

    Each method raises BundleError when the tensor is missing or of another shape or kind.
    """

    def matrix(self, name: str, rows: int, cols: int, bias: bool = False) -> Any:
        """A matrix [rows, cols] in the backend's form; bias: with the vector `name`.bias, added to its products."""

    def vector(self, name: str, *shape: int) -> F32:
        """A float32 array of exactly `shape`."""

    def ffn(self, name: str, hidden: int, intermediate: int) -> Any:
        """A feed-forward record (FfnWeights)."""
