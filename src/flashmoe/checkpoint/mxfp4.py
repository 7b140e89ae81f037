"""MXFP4: E2M1 values with a power of two for 32 of them, as gpt-oss and compressed-tensors store it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashmoe.checkpoint.dtypes import F32
from flashmoe.checkpoint.float_codes import FP4_CODES, e8m0, nibbles
from flashmoe.checkpoint.matrices import AffineRows, CodedMatrix, ScaleType
from flashmoe.checkpoint.tensors import Run, TensorRef
from flashmoe.errors import CheckpointError


@dataclass(frozen=True)
class Mxfp4Matrix(CodedMatrix):
    """Two values a byte, the first in the low half; ``blocks`` has 16 bytes for each byte of ``powers``.

    As affine codes the 16 values are some of the 25 from -6 to 6 in steps of a half: five bits, or four with a table,
    without loss.
    """

    blocks: TensorRef
    powers: TensorRef
    rows: int
    cols: int
    bits: int = 5
    group: int = 32

    @property
    def form(self) -> str:
        """MXFP4."""
        return "MXFP4"

    @property
    def scale_type(self) -> ScaleType:
        """Powers of two and twelve of them: bf16 has the exponents."""
        return "BF16"

    @property
    def table(self) -> tuple[int, ...]:
        """Each FP4 code as an affine one."""
        return tuple(FP4_CODES.tolist())

    def read_entries(self, runs: Sequence[Run]) -> AffineRows:
        """The FP4 codes themselves; raises CheckpointError on NaN or infinity."""
        return AffineRows(nibbles(self.blocks.read_rows(runs, self.cols // 2)), *self.read_scales(runs))

    def read(self, runs: Sequence[Run]) -> AffineRows:
        """Codes, scales and biases of the rows of ``runs``; raises CheckpointError on NaN or infinity."""
        entries = self.read_entries(runs)
        return entries._replace(codes=FP4_CODES[entries.codes])

    def read_scales(self, runs: Sequence[Run]) -> tuple[F32, F32]:
        """Scales and biases alone, float32 [rows of runs, cols // 32] each."""
        scales = e8m0(self.powers.read_rows(runs, self.cols // 32)) * np.float32(0.5)
        return mxfp4_scales(scales, self.powers)

    def refs(self) -> tuple[TensorRef, ...]:
        """The tensors it is read from."""
        return self.blocks, self.powers


def mxfp4_scales(halves: F32, ref: TensorRef) -> tuple[F32, F32]:
    """Scales and biases of FP4_CODES for halves of the powers; raises CheckpointError on NaN or infinity."""
    with np.errstate(over="ignore"):
        biases = np.float32(-12) * halves
    return ref.finite(halves), ref.finite(biases)


def mxfp4_matrix(blocks: TensorRef, powers: TensorRef, size: tuple[int, int]) -> Mxfp4Matrix:
    """The matrix of packed values and E8M0 scales; raises CheckpointError when they do not fit each other."""
    rows, cols = size
    lead = powers.entry.shape
    per_element = 8 if blocks.entry.dtype == "U32" else 2  # MLX packs into words
    fits = (
        cols % 32 == 0
        and blocks.entry.dtype in ("U8", "U32")
        and powers.entry.dtype in ("U8", "F8_E8M0")
        and lead[-1:] == (cols // 32,)
        and math.prod(lead) == rows * cols // 32
        and blocks.entry.shape in ((*lead, 32 // per_element), (*lead[:-1], cols // per_element))
    )
    if not fits:
        raise CheckpointError(
            f"{blocks.where} {blocks.entry.dtype} {list(blocks.entry.shape)} with scales {list(lead)} is no MXFP4"
            f" form of [{rows}, {cols}]: check config.json, or use a bf16 variant"
        )
    return Mxfp4Matrix(blocks, powers, rows, cols)
