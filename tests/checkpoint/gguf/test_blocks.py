"""Every tensor type that the gguf package dequantises: the same values, and what 16-bit scales cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants

from flashmoe.bundle.codecs import TileCodec
from flashmoe.checkpoint.gguf.blocks import AFFINE, REFITTED
from flashmoe.checkpoint.gguf.matrices import block_matrix
from flashmoe.checkpoint.gguf.types import BLOCKS, TYPE_NAMES
from flashmoe.checkpoint.header import TensorEntry
from flashmoe.checkpoint.matrices import CodedMatrix
from flashmoe.checkpoint.tensors import TensorRef
from flashmoe.convert.encode import Part, choose_form, encode, plain_scale_type
from flashmoe.errors import CheckpointError

# Of the package, 0.19; floats are FloatMatrix.
DEQUANTISED = sorted(kind.name for kind in quants._type_traits)
QUANTISED = [name for name in DEQUANTISED if BLOCKS[name][0] > 1]
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "TQ2_0")
# Where f16 scales stand in a block, by byte.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip
# Largest error of a bundle's value, in parts of the largest of 256 values in a row, as measured (docs/formats.md).
ERRORS = {
    "Q4_K": 5e-4, "Q5_K": 5e-4, "IQ4_XS": 5e-4, "Q6_K": 8e-3, "NVFP4": 8e-3, "TQ1_0": 8e-3, "Q2_K": 0.08, "Q3_K": 0.12,
    "IQ1_S": 0.12, "IQ1_M": 0.12, "IQ2_XXS": 0.12, "IQ2_XS": 0.14, "IQ2_S": 0.14, "IQ3_XXS": 0.12, "IQ3_S": 0.12,
}  # fmt: skip
ROWS, COLS = 48, 512


def random_blocks(dtype: str) -> Any:
    """Any codes, with scales as weights have them: 1e-3 to 1e-2 for a block."""
    per_block, nbytes = BLOCKS[dtype]
    rng = np.random.default_rng(len(dtype) + nbytes)
    blocks = rng.integers(0, 256, (ROWS * COLS // per_block, nbytes), dtype=np.uint8)
    for at in HALVES.get(dtype, ()):
        scale = rng.uniform(1e-4, 1e-3, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    if dtype == "IQ1_M":  # its f16 is spread over the high nibbles of four words
        scale = rng.uniform(1e-4, 1e-3, len(blocks)).astype("<f2").view(np.uint16)
        words = blocks[:, 48:56].copy().view("<u2") & 0x0FFF
        for i in range(4):
            words[:, i] |= (scale >> (4 * i) & 15) << 12
        blocks[:, 48:56] = words.view(np.uint8)
    if dtype == "MXFP4":
        blocks[:, 0] = rng.integers(110, 126, len(blocks))
    if dtype == "NVFP4":
        blocks[:, :4] = rng.integers(1, 0x7E, (len(blocks), 4))
    return blocks.reshape(ROWS, -1)


def matrix_of(folder: Path, dtype: str) -> tuple[Any, Any]:
    raw = random_blocks(dtype)
    (folder / "x.gguf").write_bytes(raw.tobytes())
    ref = TensorRef(TensorEntry("x.weight", dtype, (ROWS, COLS), 0, raw.nbytes), folder / "x.gguf")
    return block_matrix(ref, ROWS, COLS), quants.dequantize(raw, gguf.GGMLQuantizationType[dtype])


def bundled(matrix: Any) -> Any:
    """The values that a bundle would have."""
    parts = [Part(matrix, ((0, matrix.rows),))]
    form = choose_form(parts, None, 4, plain_scale_type(parts))
    assert isinstance(form.codec, TileCodec)
    assert form.codec.group == 32
    return form.codec.values(encode(parts[0], form))


def test_types_and_block_sizes_are_those_of_the_package() -> None:
    assert {
        kind.name: gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType if kind.name in BLOCKS
    } == {name: BLOCKS[name] for name in BLOCKS if name in gguf.GGMLQuantizationType.__members__}
    assert {number: gguf.GGMLQuantizationType(number).name for number in TYPE_NAMES if number <= 40} == {
        number: name for number, name in TYPE_NAMES.items() if number <= 40
    }


def test_all_types_that_the_package_dequantises_are_read() -> None:
    assert set(QUANTISED) <= set(AFFINE) | set(REFITTED)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_values_are_those_of_the_package(tmp_path: Path, dtype: str) -> None:
    matrix, values = matrix_of(tmp_path, dtype)
    assert np.array_equal(matrix.read_values([(0, ROWS)]), values)
    assert np.array_equal(matrix.read_values([(40, 8), (3, 1)]), values[[*range(40, 48), 3]])
    assert matrix.form == dtype


@pytest.mark.parametrize("dtype", QUANTISED)
def test_what_a_bundle_makes_of_them(tmp_path: Path, dtype: str) -> None:
    matrix, values = matrix_of(tmp_path, dtype)
    found = bundled(matrix)
    if dtype in EXACT:
        assert isinstance(matrix, CodedMatrix)
        assert not matrix.rounded
        assert np.array_equal(found, values)
        return
    largest = np.abs(values).reshape(-1, 256).max(axis=1, keepdims=True)
    error = np.abs(found - values).reshape(-1, 256) / largest
    rms = np.sqrt(np.square(found - values).mean() / np.square(values).mean())
    print(f"{dtype}: rms error {rms:.2e} of the rms value, largest {error.max():.2e} of the largest value")
    assert error.max() <= ERRORS[dtype]


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "MXFP4", "Q6_K"])
def test_scales_that_are_no_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    raw = random_blocks(dtype)
    blocks = raw.reshape(-1, BLOCKS[dtype][1])
    at = HALVES.get(dtype, (0,))[0]
    blocks[5, at : at + 2] = [0xFF, 0x7C if dtype != "MXFP4" else blocks[5, 1]]
    (tmp_path / "x.gguf").write_bytes(raw.tobytes())
    ref = TensorRef(TensorEntry("x.weight", dtype, (ROWS, COLS), 0, raw.nbytes), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"'x\.weight' holds NaN or infinity"):
        block_matrix(ref, ROWS, COLS).read_values([(0, ROWS)])


@pytest.mark.parametrize("dtype", ["Q8_K", "Q1_0", "Q2_0"])
def test_types_that_nobody_dequantises_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    entry = TensorEntry("x.weight", dtype, (ROWS, COLS), 0, 0)
    with pytest.raises(CheckpointError, match=f"type {dtype}"):
        block_matrix(TensorRef(entry, tmp_path / "x.gguf"), ROWS, COLS)


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    entry = TensorEntry("x.weight", "Q6_K", (ROWS, COLS), 0, 0)
    with pytest.raises(CheckpointError, match=r"Q6_K: pip install 'flashmoe\[gguf\]'"):
        block_matrix(TensorRef(entry, tmp_path / "x.gguf"), ROWS, COLS)
