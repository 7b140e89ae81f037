"""What a model needs from a checkpoint, as data: the bundle's names on one side, the source's on the other.

A model's name map makes these from its config alone; convert/plan.py matches them with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# "sensitive" matrices are a few rows whose error the whole layer feels (router, gates): always 8 bit.
Role = Literal["plain", "sensitive"]


@dataclass(frozen=True)
class MatrixSource:
    """Rows of a checkpoint matrix (canonical module name, leading dimensions flattened).

    ``runs`` are (first row, count) in the order wanted, out of ``rows`` rows of ``cols`` columns.
    """

    module: str
    rows: int
    cols: int
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, module: str, rows: int, cols: int) -> MatrixSource:
        """All rows of a matrix."""
        return cls(module, rows, cols, ((0, rows),))

    @property
    def picked_rows(self) -> int:
        """How many rows the runs select."""
        return sum(count for _, count in self.runs)


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix of the bundle, [source.picked_rows, source.cols]."""

    name: str
    source: MatrixSource
    role: Role = "plain"


@dataclass(frozen=True)
class VectorSpec:
    """A float tensor of the bundle, stored f32 in ``shape``.

    ``zero_centred`` marks norm weights that a Hugging Face checkpoint stores as w for a multiplier of 1 + w.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    zero_centred: bool = False


@dataclass(frozen=True)
class FfnSource:
    """The three matrices of one FFN: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    gate: MatrixSource
    up: MatrixSource
    down: MatrixSource


@dataclass(frozen=True)
class FfnSpec:
    """A shared expert or dense FFN, kept resident as one record."""

    name: str
    hidden: int
    intermediate: int
    source: FfnSource


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts of a layer; ``forms`` are the ways a checkpoint may store expert e, in order."""

    layer: int
    count: int
    hidden: int
    intermediate: int
    forms: tuple[Callable[[int], FfnSource], ...]


Spec = MatrixSpec | VectorSpec | FfnSpec


@dataclass(frozen=True)
class ModelSpec:
    """Everything a bundle of a model holds; resident tensors in file order, an untied embedding last."""

    resident: tuple[Spec, ...]
    experts: tuple[ExpertsSpec, ...]
    tied: bool
