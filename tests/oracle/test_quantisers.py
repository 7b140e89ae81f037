"""The packed matrices that readers are tested with, taken apart by the libraries whose formats they are.

tests/checkpoint/test_quantized.py holds our readers to the same values, to the bit.  The libraries' modules are loaded
as files: their packages import what only a GPU has.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROWS, COLS = 64, 128


def library_file(package: str, *parts: str) -> ModuleType:
    """A module of an installed package, without what stands around it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed: its format is compared with our own packer only")
    name = "_".join((package, *parts))
    spec = importlib.util.spec_from_file_location(
        name, Path(found.origin).parent.joinpath(*parts[:-1], f"{parts[-1]}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensor(packed: Any, name: str) -> torch.Tensor:
    stored = packed.tensors[name]
    kinds = {"I32": "<i4", "F16": "<f2"}
    return torch.from_numpy(np.frombuffer(stored.data, kinds[stored.dtype]).reshape(stored.shape).copy())


def filled(layer: Any, packed: Any) -> Any:
    """A library's linear layer with the packed tensors; scales in float32, so that products are not rounded twice."""
    layer.qweight, layer.qzeros = tensor(packed, ".qweight"), tensor(packed, ".qzeros")
    layer.scales = tensor(packed, ".scales").float()
    layer.g_idx = tensor(packed, ".g_idx")
    return layer


def multiplied(layer: Any) -> np.ndarray:
    """Its weights [rows, cols]: what it makes of the identity."""
    with torch.no_grad():
        values: np.ndarray = layer(torch.eye(COLS)).numpy().T
    return values


@pytest.mark.parametrize("form", ["gptq", "gptq 2 bit", "gptq 3 bit", "gptq asymmetric", "gptq act-order"])
def test_gptq(quantized_forms: Any, form: str) -> None:
    """AutoGPTQ, the first version of the format."""
    library = library_file("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda")
    packed = quantized_forms.make(form, ROWS, COLS)
    layer = library.QuantLinear(packed.config["bits"], packed.config["group_size"], COLS, ROWS, bias=False)
    assert np.array_equal(multiplied(filled(layer, packed)), packed.values)


@pytest.mark.parametrize("form", ["gptq of 64, v2", "gptq 8 bit"])
def test_gptq_of_the_second_version(quantized_forms: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoRound, whose zero points are stored as they are."""
    packing = library_file("auto_round", "utils", "bit_packing")
    utils = ModuleType("auto_round.utils")
    utils.get_packing_device = lambda device=None: "cpu"  # type: ignore[attr-defined]
    for name, module in (("auto_round", ModuleType("auto_round")), ("auto_round.utils", utils)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "auto_round.utils.bit_packing", packing)
    library = library_file("auto_round_extension", "torch", "qlinear_torch")
    packed = quantized_forms.make(form, ROWS, COLS)
    layer = library.QuantLinear(packed.config["bits"], packed.config["group_size"], COLS, ROWS, bias=False)
    assert np.array_equal(multiplied(filled(layer, packed)), packed.values)


@pytest.mark.parametrize("form", ["awq", "awq symmetric"])
def test_awq(quantized_forms: Any, form: str) -> None:
    """AutoAWQ's GEMM layout."""
    library = library_file("awq", "utils", "packing_utils")
    packed = quantized_forms.make(form, ROWS, COLS)
    values = library.dequantize_gemm(
        tensor(packed, ".qweight"), tensor(packed, ".qzeros"), tensor(packed, ".scales").float(), 4,
        packed.config["group_size"],
    )  # fmt: skip
    assert np.array_equal(values.numpy().T, packed.values)


@pytest.mark.parametrize(
    "form", ["packed int4", "packed int8", "packed int3", "packed int4 asymmetric", "packed int6 asymmetric"]
)
def test_compressed_tensors(quantized_forms: Any, form: str) -> None:
    """Codes and zero points as the library unpacks them."""
    if importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed_tensors is not installed: its format is compared with our own packer only")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed = quantized_forms.make(form, ROWS, COLS)
    bits = packed.config["config_groups"]["group_0"]["weights"]["num_bits"]
    codes = unpack_from_int32(tensor(packed, ".weight_packed"), bits, torch.Size((ROWS, COLS)))
    raw = packed.tensors[".weight_scale"]
    scales = (np.frombuffer(raw.data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(raw.shape)
    each = COLS // scales.shape[1]
    zeros = np.zeros_like(scales)
    if ".weight_zero_point" in packed.tensors:
        stored = tensor(packed, ".weight_zero_point")
        zeros = (
            unpack_from_int32(stored, bits, torch.Size(scales.shape), packed_dim=0).numpy().astype(np.float32)
        )
    values = (codes.numpy() - np.repeat(zeros, each, 1)) * np.repeat(scales, each, 1)
    assert np.array_equal(values, packed.values)
