"""Which form a matrix has, from the tensors that are there under its name."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flashmoe.checkpoint.columns import awq_matrix, gptq_matrix
from flashmoe.checkpoint.fp8 import fp8_matrix, int8_matrix
from flashmoe.checkpoint.gguf.matrices import block_matrix
from flashmoe.checkpoint.gguf.types import BLOCKS
from flashmoe.checkpoint.matrices import AffineMatrix, FloatMatrix, Matrix
from flashmoe.checkpoint.mxfp4 import mxfp4_matrix
from flashmoe.checkpoint.packed import nvfp4_matrix, packed_matrix
from flashmoe.checkpoint.quantization import Quantization
from flashmoe.checkpoint.tensors import FLOAT_TYPES, TensorRef
from flashmoe.errors import CheckpointError

# What follows a module's name in the tensor that holds its weights.
_WEIGHTS = ("", ".weight", ".qweight", ".weight_packed", "_blocks")


class Tensors:
    """The tensors of a checkpoint by canonical name.  Immutable."""

    def __init__(self, place: str, tensors: Mapping[str, TensorRef], quantization: Quantization) -> None:
        """``place`` is how messages name the checkpoint."""
        self._place, self._tensors, self._quantization = place, tensors, quantization

    def ref(self, name: str) -> TensorRef:
        """The tensor of a canonical name; raises CheckpointError when it is missing."""
        ref = self._tensors.get(name)
        if ref is None:
            raise CheckpointError(
                f"{self._place} has no tensor {name!r}: download the checkpoint again, all of it"
            )
        return ref

    def has(self, module: str) -> bool:
        """True when the matrix ``module`` exists in some form."""
        return self._weight_name(module) is not None

    def matrix(self, module: str, rows: int, cols: int) -> Matrix:
        """The matrix of ``module`` with leading dimensions flattened to ``rows``.

        Raises CheckpointError when it is missing, of another size, or quantised in an unknown way.
        """
        name = self._weight_name(module)
        weight = self.ref(f"{module}.weight" if name is None else name)
        assert name is not None
        suffix = name[len(module) :]
        if suffix == ".qweight":
            return self._columns(module, weight, (rows, cols))
        if suffix == "_blocks":
            return mxfp4_matrix(weight, self.ref(f"{module}_scales"), (rows, cols))
        if suffix == ".weight_packed":
            return self._packed(module, weight, (rows, cols))
        shape = weight.entry.shape
        if f"{module}.scales" in self._tensors:
            return self._mlx(module, weight, rows, cols)
        if rows == 1 and len(shape) == 1:  # GGUF has no matrices of one row
            shape = (1, *shape)
        found = math.prod(shape[:-1]) if len(shape) > 1 else 0, shape[-1] if shape else 0
        if found != (rows, cols):
            raise CheckpointError(
                f"{weight.where} is {list(shape)}, [{rows}, {cols}] wanted: check config.json"
            )
        if BLOCKS.get(weight.entry.dtype, (1, 0))[0] > 1:
            return block_matrix(weight, rows, cols)
        if weight.entry.dtype in ("F8_E4M3", "I8"):
            return self._scaled(name, weight, (rows, cols))
        if weight.entry.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{weight.where} has the type {weight.entry.dtype}: use the bf16 or MLX variant"
            )
        return FloatMatrix(weight, rows, cols)

    def _weight_name(self, module: str) -> str | None:
        return next((module + end for end in _WEIGHTS if module + end in self._tensors), None)

    def _columns(self, module: str, weight: TensorRef, size: tuple[int, int]) -> Matrix:
        tensors = weight, self.ref(f"{module}.qzeros"), self.ref(f"{module}.scales")
        stated = self._quantization
        if stated.method == "awq" or weight.entry.shape == (size[1], size[0] // 8):
            return awq_matrix(tensors, size)
        indices = self._tensors.get(f"{module}.g_idx")
        return gptq_matrix(tensors, indices, size, stated.act_order, stated.zero_offset)

    def _packed(self, module: str, weight: TensorRef, size: tuple[int, int]) -> Matrix:
        scales = self.ref(f"{module}.weight_scale")
        divisor = self._tensors.get(f"{module}.weight_global_scale")
        if divisor is not None:
            return nvfp4_matrix((weight, scales, divisor), size)
        if weight.entry.dtype == "U8":
            return mxfp4_matrix(weight, scales, size)
        zeros, indices = (self._tensors.get(f"{module}.weight_{end}") for end in ("zero_point", "g_idx"))
        return packed_matrix((weight, scales), zeros, indices, size, self._quantization.packed_bits)

    def _scaled(self, name: str, weight: TensorRef, size: tuple[int, int]) -> Matrix:
        inverse, plain = (self._tensors.get(f"{name}_{end}") for end in ("scale_inv", "scale"))
        scale = inverse or plain
        if scale is None:
            raise CheckpointError(
                f"{weight.where} is {weight.entry.dtype} without a scale: download the checkpoint again"
            )
        if weight.entry.dtype == "F8_E4M3":
            return fp8_matrix(weight, scale, size, self._quantization.block)
        return int8_matrix(weight, scale, self._tensors.get(f"{name}_zero_point"), size)

    def _mlx(self, module: str, weight: TensorRef, rows: int, cols: int) -> Matrix:
        scales = self.ref(f"{module}.scales")
        if f"{module}.biases" not in self._tensors and scales.entry.dtype == "U8":
            return mxfp4_matrix(weight, scales, (rows, cols))
        biases = self.ref(f"{module}.biases")
        words, groups = (ref.entry.shape[-1] if ref.entry.shape else 0 for ref in (weight, scales))
        bits, group = words * 32 // cols, cols // max(groups, 1)
        _check_affine(weight, scales, biases, (bits, group), (rows, cols))
        stated = self._stated(module, weight.entry.name)
        if stated is not None and stated != (bits, group):
            raise CheckpointError(
                f"{weight.where} has {bits} bits in groups of {group}, config.json says {stated}:"
                " download both again"
            )
        return AffineMatrix(weight, scales, biases, rows, cols, bits, group)

    def _stated(self, module: str, original: str) -> tuple[int, int] | None:
        """(bits, group) that config.json states for a module, overrides by either spelling first."""
        stated = self._quantization.stated
        default = stated.get("")
        return stated.get(original.removesuffix(".weight"), stated.get(module, default))


def _check_affine(
    weight: TensorRef, scales: TensorRef, biases: TensorRef, form: tuple[int, int], size: tuple[int, int]
) -> None:
    (bits, group), (rows, cols) = form, size
    lead = weight.entry.shape[:-1]
    fits = (
        weight.entry.dtype == "U32"
        and bits in (2, 3, 4, 5, 6, 8)
        and group in (32, 64, 128)
        and weight.entry.shape == (*lead, cols * bits // 32)
        and scales.entry.shape == biases.entry.shape == (*lead, cols // group)
        and cols % group == 0
        and {scales.entry.dtype, biases.entry.dtype} <= set(FLOAT_TYPES)
    )
    if not fits:
        raise CheckpointError(
            f"{weight.where} {weight.entry.dtype} {list(weight.entry.shape)}"
            f" with scales {list(scales.entry.shape)} is"
            f" no MLX affine form of [{rows}, {cols}]: use an affine 2 to 8 bit or a bf16 variant"
        )
    if math.prod(lead) != rows:
        raise CheckpointError(
            f"{weight.where} is {list(weight.entry.shape)}, [{rows}, {cols}] wanted: check config.json"
        )
