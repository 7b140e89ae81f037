"""Biases of experts: a few values of a row of a checkpoint's tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.tensors import FLOAT_TYPES, TensorRef
from flashmoe.errors import CheckpointError


@dataclass(frozen=True)
class Bias:
    """Every ``step``-th value from ``first`` on of row ``row``."""

    ref: TensorRef
    row: int
    first: int
    step: int

    @classmethod
    def of(cls, ref: TensorRef, size: tuple[int, int], row: int, first: int, step: int) -> Bias:
        """A bias of a tensor of ``size`` rows and columns; raises CheckpointError when it has another one."""
        shape = ref.entry.shape
        found = math.prod(shape[:-1]), shape[-1] if shape else 0
        if found != size or ref.entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{ref.where} is {ref.entry.dtype} {list(shape)}, floats {list(size)} wanted: check config.json"
            )
        return cls(ref, row, first, step)

    def read(self) -> F32:
        """float32 [n]; raises CheckpointError on NaN or infinity."""
        values = self.ref.floats([(self.row, 1)])[0, self.first :: self.step]
        return np.ascontiguousarray(values)


Biases = tuple[Bias, Bias, Bias]
