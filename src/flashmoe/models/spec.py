"""What a model needs from a checkpoint, as data: the bundle's names on one side, the source's on the other.

A model's name map makes these from its config alone; convert/plan.py matches them with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flashmoe.bundle.codecs import ClampedGlu

# "sensitive" matrices are a few rows whose error the whole layer feels (router, gates): always 8 bit.
Role = Literal["plain", "sensitive"]


@dataclass(frozen=True)
class Order:
    """A checkpoint's matrix [stored_rows, stored_cols] that lies in another way than the one wanted.

    ``turned``: the columns of each block of so many stored rows are the rows wanted, and the block's first rows their
    columns (as many as wanted).  ``woven``: of each so many rows, the turned ones if both apply, the even ones are
    wanted before the odd ones.  0: neither.
    """

    stored_rows: int
    stored_cols: int
    turned: int = 0
    woven: int = 0


@dataclass(frozen=True)
class MatrixSource:
    """Rows of a checkpoint matrix (canonical module name, leading dimensions flattened).

    ``runs`` are (first row, count) in the order wanted, out of ``rows`` rows of ``cols`` columns, as they are when
    ``order`` has been undone.
    """

    module: str
    rows: int
    cols: int
    runs: tuple[tuple[int, int], ...]
    order: Order | None = None

    @classmethod
    def whole(cls, module: str, rows: int, cols: int) -> MatrixSource:
        """All rows of a matrix."""
        return cls(module, rows, cols, ((0, rows),))

    @property
    def picked_rows(self) -> int:
        """How many rows the runs select."""
        return sum(count for _, count in self.runs)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns as the checkpoint has them."""
        return (
            (self.rows, self.cols) if self.order is None else (self.order.stored_rows, self.order.stored_cols)
        )


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix of the bundle, [source.picked_rows, source.cols].

    ``others``: where other checkpoints than Hugging Face's have it, of the same size.
    """

    name: str
    source: MatrixSource
    role: Role = "plain"
    others: tuple[MatrixSource, ...] = ()


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
class BiasSource:
    """Every ``step``-th value from ``first`` on of one row of a checkpoint's tensor [rows, cols]."""

    tensor: str
    rows: int
    cols: int
    row: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class FfnSource:
    """The three matrices of one FFN: gate and up [intermediate, hidden], down [hidden, intermediate].

    ``biases`` of gate, up and down: all or none.  ``mark``: the module or tensor whose presence tells that a checkpoint
    has this form; empty: the gate.
    """

    gate: MatrixSource
    up: MatrixSource
    down: MatrixSource
    biases: tuple[BiasSource, BiasSource, BiasSource] | None = None
    mark: str = ""


@dataclass(frozen=True)
class FfnSpec:
    """A shared expert or dense FFN, kept resident as one record."""

    name: str
    hidden: int
    intermediate: int
    source: FfnSource


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts of a layer; ``forms`` are the ways a checkpoint may store expert e, in order.

    ``published``: that of them which float checkpoints of the family have.  ``glu`` joins gate and up (None:
    silu(gate) * up); ``biased``: every form has biases.
    """

    layer: int
    count: int
    hidden: int
    intermediate: int
    forms: tuple[Callable[[int], FfnSource], ...]
    published: Callable[[int], FfnSource]
    glu: ClampedGlu | None = None
    biased: bool = False


Spec = MatrixSpec | VectorSpec | FfnSpec


@dataclass(frozen=True)
class ModelSpec:
    """Everything a bundle of a model holds; resident tensors in file order, an untied embedding last."""

    resident: tuple[Spec, ...]
    experts: tuple[ExpertsSpec, ...]
    tied: bool
    unused: tuple[str, ...] = ()  # beginnings of names of known tensors that it does without
