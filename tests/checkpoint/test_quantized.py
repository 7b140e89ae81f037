"""Quantised matrices: every form gives its published values, whatever rows are read, and misfits are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.checkpoint import Checkpoint, CodedMatrix, Matrix
from flashmoe.errors import CheckpointError

SHARED = Path(__file__).parents[3] / "shared" / "reference" / "ref_quant.py"
ROWS, COLS = 200, 192  # neither a multiple of an FP8 block
RUNS = [(37, 100), (0, 3), (199, 1), (8, 8)]
FORMS = [
    "fp8 block", "fp8 block of 64, bf16 scales", "fp8 channel", "fp8 tensor", "int8 channel",
    "gptq", "gptq of 64, v2", "gptq 2 bit", "gptq 3 bit", "gptq 8 bit", "gptq asymmetric", "gptq act-order",
    "awq symmetric", "awq", "packed int4", "packed int4 asymmetric", "packed int4 channel", "packed int8",
    "packed int3", "packed int6 asymmetric", "packed int4 act-order", "nvfp4", "mxfp4", "mxfp4 blocks",
]  # fmt: skip


def rows_of(form: str) -> int:
    return (
        192 if "gptq 2 bit" in form or "3 bit" in form else ROWS
    )  # GPTQ's zero points must fill whole words


def opened(folder: Path, forms: Any, packed: Any, quantization: Any = None) -> Checkpoint:
    tensors = {f"model.x{end}": tensor for end, tensor in packed.tensors.items()}
    config = {"quantization_config": quantization or packed.config}
    return Checkpoint.open(forms.write_checkpoint(folder, tensors, config))


def matrix_of(folder: Path, forms: Any, form: str) -> tuple[Matrix, Any]:
    packed = forms.make(form, rows_of(form), COLS)
    checkpoint = opened(folder, forms, packed)
    assert checkpoint.has("x")
    return checkpoint.matrix("x", rows_of(form), COLS), packed


def test_all_forms_are_tested(quantized_forms: Any) -> None:
    assert list(quantized_forms.FORMS) == FORMS


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_format(tmp_path: Path, quantized_forms: Any, form: str) -> None:
    matrix, packed = matrix_of(tmp_path / "c", quantized_forms, form)
    runs = [run for run in RUNS if sum(run) <= matrix.rows]
    picked = np.concatenate([np.arange(start, start + count) for start, count in runs])
    assert np.array_equal(matrix.read_values([(0, matrix.rows)]), packed.values)
    assert np.array_equal(matrix.read_values(runs), packed.values[picked])
    assert {ref.entry.name for ref in matrix.refs()} == {
        f"model.x{end}" for end in packed.tensors if end != ".weight_shape"
    }


@pytest.mark.parametrize("form", FORMS)
def test_codes_stay_within_their_bits(tmp_path: Path, quantized_forms: Any, form: str) -> None:
    matrix, packed = matrix_of(tmp_path / "c", quantized_forms, form)
    if not isinstance(matrix, CodedMatrix):
        assert matrix.fit is not None
        return
    rows = matrix.read([(0, matrix.rows)])
    assert matrix.group % 32 == 0
    assert rows.codes.max() < 1 << matrix.bits
    assert rows.scales.shape == rows.biases.shape == (matrix.rows, COLS // matrix.group)
    scales, biases = matrix.read_scales([(5, 50)])
    assert np.array_equal(scales, rows.scales[5:55])
    assert np.array_equal(biases, rows.biases[5:55])
    assert np.array_equal(rows.values(), packed.values)


def test_packers_agree_with_the_published_reference(quantized_forms: Any) -> None:
    """numpy dequantisers that were compared with mlx, vLLM's packing, transformers and compressed-tensors."""
    if not SHARED.is_file():
        pytest.skip(f"no {SHARED}: the packers are not compared with the reference dequantisers")
    namespace: dict[str, Any] = {"__name__": "ref_quant"}
    exec(compile(SHARED.read_text(), str(SHARED), "exec"), namespace)

    def arrays(form: str) -> tuple[dict[str, Any], Any]:
        packed = quantized_forms.make(form, 192, COLS)
        items = quantized_forms.ITEMS
        return {
            end: np.frombuffer(t.data, items[t.dtype]).reshape(t.shape)
            for end, t in packed.tensors.items()
            if t.dtype in items
        }, packed.values

    tensors, values = arrays("fp8 block")
    assert np.array_equal(namespace["fp8_block"](tensors[".weight"], tensors[".weight_scale_inv"]), values)
    for form, bits, first in (
        ("gptq", 4, True),
        ("gptq 3 bit", 3, True),
        ("gptq act-order", 4, True),
        ("gptq 8 bit", 8, False),
    ):
        t, values = arrays(form)
        found = namespace["gptq"](t[".qweight"], t[".qzeros"], t[".scales"], t[".g_idx"], bits, first)
        assert np.array_equal(found.T, values), form
    t, values = arrays("awq")
    assert np.array_equal(namespace["awq"](t[".qweight"], t[".qzeros"], t[".scales"], 64).T, values)
    t, values = arrays("nvfp4")
    found = namespace["ct_nvfp4"](t[".weight_packed"], t[".weight_scale"], 300)
    assert np.array_equal(found, values)
    t, values = arrays("mxfp4 blocks")
    assert np.array_equal(namespace["oss_mxfp4"](t["_blocks"][None], t["_scales"][None])[0], values)


WRONG: list[tuple[str, str, tuple[str, tuple[int, ...]]]] = [
    ("fp8 block", ".weight_scale_inv", ("F32", (3, 2))),
    ("fp8 block", ".weight_scale_inv", ("F32", (2, 2, 1))),
    ("fp8 block", ".weight_scale_inv", ("U8", (2, 2))),
    ("fp8 channel", ".weight_scale", ("BF16", (199, 1))),
    ("int8 channel", ".weight_scale", ("BF16", (200, 3, 1))),
    ("int8 channel", ".weight_scale", ("BF16", (1, 1))),
    ("gptq", ".qweight", ("I32", (24, 199))),
    ("gptq", ".qweight", ("I32", (0, 200))),
    ("gptq", ".qzeros", ("I32", (6, 24))),
    ("gptq", ".scales", ("F16", (7, 200))),
    ("gptq", ".scales", ("F16", (0, 200))),
    ("gptq", ".scales", ("I32", (6, 200))),
    ("gptq", ".g_idx", ("I32", (191,))),
    ("awq", ".qweight", ("F32", (192, 25))),
    ("awq", ".qzeros", ("I32", (3, 24))),
    ("awq", ".scales", ("F16", (192,))),
    ("packed int4", ".weight_packed", ("I32", (200, 23))),
    ("packed int4", ".weight_scale", ("BF16", (200, 7))),
    ("packed int4", ".weight_scale", ("BF16", (200, 192))),
    ("packed int4 asymmetric", ".weight_zero_point", ("I32", (24, 6))),
    ("packed int4 act-order", ".weight_g_idx", ("I32", (1,))),
    ("nvfp4", ".weight_scale", ("F8_E4M3", (200, 11))),
    ("nvfp4", ".weight_global_scale", ("F32", (2,))),
    ("mxfp4", ".weight_scale", ("U8", (200, 5))),
    ("mxfp4 blocks", "_blocks", ("U8", (200, 6, 15))),
]


@pytest.mark.parametrize(("form", "end", "other"), WRONG)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, quantized_forms: Any, form: str, end: str, other: tuple[str, tuple[int, ...]]
) -> None:
    packed = quantized_forms.make(form, rows_of(form), COLS)
    packed.tensors[end] = quantized_forms.stored(np.zeros(other[1], np.float32), other[0])
    checkpoint = opened(tmp_path / "c", quantized_forms, packed)
    with pytest.raises(CheckpointError, match=r"tensor 'model\.x"):
        checkpoint.matrix("x", rows_of(form), COLS)


@pytest.mark.parametrize("form", FORMS)
def test_another_size_than_the_models_is_refused(tmp_path: Path, quantized_forms: Any, form: str) -> None:
    packed = quantized_forms.make(form, rows_of(form), COLS)
    checkpoint = opened(tmp_path / "c", quantized_forms, packed)
    for rows, cols in ((rows_of(form) + 8, COLS), (rows_of(form), COLS + 64), (COLS, rows_of(form) + 32)):
        with pytest.raises(CheckpointError):
            checkpoint.matrix("x", rows, cols)


@pytest.mark.parametrize("form", FORMS)
def test_half_a_form_is_refused(tmp_path: Path, quantized_forms: Any, form: str) -> None:
    """Without one of its tensors a matrix is missing or unreadable; optional ones may be absent."""
    packed = quantized_forms.make(form, rows_of(form), COLS)
    optional = (".g_idx", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale")
    for i, end in enumerate(end for end in packed.tensors if end not in optional):
        rest = packed._replace(tensors={k: v for k, v in packed.tensors.items() if k != end})
        with pytest.raises(CheckpointError):
            opened(tmp_path / str(i), quantized_forms, rest).matrix("x", rows_of(form), COLS)


@pytest.mark.parametrize(
    ("form", "end", "dtype", "value"),
    [
        ("fp8 block", ".weight", "F8_E4M3", 0x7F),
        ("fp8 block", ".weight_scale_inv", "F32", np.nan),
        ("int8 channel", ".weight_scale", "BF16", np.inf),
        ("gptq", ".scales", "F16", np.nan),
        ("awq", ".scales", "F16", np.inf),
        ("packed int4", ".weight_scale", "BF16", np.nan),
        ("nvfp4", ".weight_scale", "F8_E4M3", 0xFF),
        ("nvfp4", ".weight_global_scale", "F32", 0),
        ("mxfp4 blocks", "_scales", "U8", 255),
        ("mxfp4 blocks", "_scales", "U8", 254),
        ("gptq act-order", ".g_idx", "I32", 6),
        ("gptq act-order", ".g_idx", "I32", -1),
        ("packed int4 act-order", ".weight_g_idx", "I32", 6),
    ],
)
def test_impossible_values_are_refused(
    tmp_path: Path, quantized_forms: Any, form: str, end: str, dtype: str, value: float
) -> None:
    packed = quantized_forms.make(form, rows_of(form), COLS)
    shape = packed.tensors[end].shape
    packed.tensors[end] = quantized_forms.stored(np.full(shape, value), dtype)
    matrix = opened(tmp_path / "c", quantized_forms, packed).matrix("x", rows_of(form), COLS)
    with pytest.raises(CheckpointError, match=r"NaN or infinity|not there|is 0"):
        matrix.read_values([(0, 10)])


def test_a_hidden_order_is_refused(tmp_path: Path, quantized_forms: Any) -> None:
    """Whether columns are reordered is decided from config.json, so that a conversion can go on without the source."""
    packed = quantized_forms.make("gptq act-order", ROWS, COLS)
    checkpoint = opened(tmp_path / "c", quantized_forms, packed, packed.config | {"desc_act": False})
    with pytest.raises(CheckpointError, match="reorders columns"):
        checkpoint.matrix("x", ROWS, COLS).read_values([(0, 1)])


def test_stacked_experts_have_blocks_of_their_own(tmp_path: Path, quantized_forms: Any) -> None:
    """FP8 of [experts, rows, cols]: the last block of an expert is cut off, the next expert begins anew."""
    parts = [quantized_forms.fp8_block(np.random.default_rng(e), ROWS, COLS) for e in range(3)]
    tensors = {
        f"experts.up_proj{end}": quantized_forms.Stored(
            first.dtype, (3, *first.shape), b"".join(p.tensors[key].data for p in parts)
        )
        for end, key in (("", ".weight"), ("_scale_inv", ".weight_scale_inv"))
        for first in [parts[0].tensors[key]]
    }
    config = {"quantization_config": parts[0].config}
    checkpoint = Checkpoint.open(quantized_forms.write_checkpoint(tmp_path / "c", tensors, config))
    matrix = checkpoint.matrix("experts.up_proj", 3 * ROWS, COLS)
    values = np.concatenate([part.values for part in parts])
    assert np.array_equal(matrix.read_values([(150, 300)]), values[150:450])


@pytest.mark.parametrize("block", [0, [128], [0, 128], [128, 1 << 40], ["a", "b"], {}])
def test_impossible_blocks_are_refused(tmp_path: Path, quantized_forms: Any, block: Any) -> None:
    packed = quantized_forms.make("fp8 block", ROWS, COLS)
    with pytest.raises(CheckpointError, match="weight_block_size"):
        opened(tmp_path / "c", quantized_forms, packed, packed.config | {"weight_block_size": block})
