"""Opening checkpoint directories: names, shards, and every way in which they can be wrong."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from flashmoe.checkpoint import AffineMatrix, Checkpoint, FloatMatrix
from flashmoe.checkpoint.checkpoint import canonical_name, header_from_json, header_to_json
from flashmoe.errors import CheckpointError

Arrays = dict[str, NDArray[Any]]


def write(folder: Path, shards: dict[str, Arrays], config: Any = None, index: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def affine(rows: int = 2, cols: int = 64, bits: int = 4, group: int = 64) -> Arrays:
    scales = np.ones((rows, cols // group), np.float16)
    return {
        "model.x.weight": np.zeros((rows, cols * bits // 32), np.uint32),
        "model.x.scales": scales,
        "model.x.biases": scales.copy(),
    }


@pytest.mark.parametrize(
    ("original", "canonical", "skipped"),
    [
        ("model.language_model.layers.3.mlp.gate.weight", "layers.3.mlp.gate.weight", None),
        ("language_model.model.norm.weight", "norm.weight", None),
        ("language_model.lm_head.scales", "lm_head.scales", None),
        ("model.embed_tokens.weight", "embed_tokens.weight", None),
        ("lm_head.weight", "lm_head.weight", None),
        ("mtp.fc.weight", "mtp.fc.weight", "mtp."),
        ("model.mtp.layers.0.mlp.gate.weight", "mtp.layers.0.mlp.gate.weight", "model.mtp."),
        ("model.visual.pos_embed.weight", "visual.pos_embed.weight", "model.visual."),
        ("vision_tower.blocks.0.weight", "vision_tower.blocks.0.weight", "vision_tower."),
    ],
)
def test_prefixes_are_taken_off(original: str, canonical: str, skipped: str | None) -> None:
    assert canonical_name(original) == (canonical, skipped)


def test_shards_without_an_index_are_all_read(tmp_path: Path) -> None:
    one, two = {"model.a": np.zeros(2, np.float32)}, {"model.b": np.ones(3, np.float32)}
    checkpoint = Checkpoint.open(write(tmp_path / "c", {"x.safetensors": one, "y.safetensors": two}))
    assert checkpoint.vector("b", 3).tolist() == [1, 1, 1]
    assert checkpoint.unused(["a"]) == ["b"]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    one, two = {"model.a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match="'a' is also"):
        Checkpoint.open(write(tmp_path / "c", {"x.safetensors": one, "y.safetensors": two}))


def test_a_shard_of_the_index_that_is_missing_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    folder = write(tmp_path / "c", {"x.safetensors": {"a": np.zeros(1, np.float32)}}, index=index)
    with pytest.raises(CheckpointError, match=r"y\.safetensors is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3, None])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: Any) -> None:
    folder = write(tmp_path / "c", {}, index={"weight_map": {"a": name}})
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": []}, {"weight_map": {"a": ["x"]}}, {"weight_map": 3}]
)
def test_a_useless_index_is_refused(tmp_path: Path, index: Any) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json|no \.safetensors"):
        Checkpoint.open(write(tmp_path / "c", {}, index=index))


def test_floats_and_affine_matrices_are_told_apart(tmp_path: Path) -> None:
    tensors = affine() | {"model.y.weight": np.zeros((2, 3, 4), np.float16)}
    checkpoint = Checkpoint.open(write(tmp_path / "c", {"x.safetensors": tensors}))
    x, y = checkpoint.matrix("x", 2, 64), checkpoint.matrix("y", 6, 4)
    assert isinstance(x, AffineMatrix)
    assert (x.bits, x.group, x.scale_type) == (4, 64, "F16")
    assert isinstance(y, FloatMatrix)


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 8, "group_size": 64},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 64, "model.x": {"bits": 2, "group_size": 64}},
        {"bits": 4, "group_size": 64, "x": {"bits": 8, "group_size": 64}},
    ],
)
def test_config_and_weights_must_agree(tmp_path: Path, quantization: Any) -> None:
    folder = write(tmp_path / "c", {"x.safetensors": affine()}, {"quantization": quantization})
    with pytest.raises(CheckpointError, match=r"has 4 bits in groups of 64, config\.json says"):
        Checkpoint.open(folder).matrix("x", 2, 64)


def test_an_override_wins_over_the_default(tmp_path: Path) -> None:
    quantization = {"bits": 8, "group_size": 32, "model.x": {"bits": 4, "group_size": 64}, "model.z": False}
    folder = write(tmp_path / "c", {"x.safetensors": affine()}, {"quantization": quantization})
    assert Checkpoint.open(folder).matrix("x", 2, 64).rows == 2


@pytest.mark.parametrize(
    "config",
    [
        {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
        {"quantization_config": {"quant_method": "awq", "version": "gemv"}},
        {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
        {"text_config": {"quantization_config": {"quant_method": ["hqq"]}}},
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError, match=r"nvfp4|bitsandbytes|marlin|gemv|e5m2|hqq"):
        Checkpoint.open(write(tmp_path / "c", {"x.safetensors": affine()}, config))


@pytest.mark.parametrize(
    "change",
    [
        {"model.x.scales": np.ones((2, 3), np.float16)},
        {"model.x.biases": np.ones((2, 2), np.float16)},
        {"model.x.scales": np.ones((3, 1), np.float16)},
        {"model.x.scales": np.ones((), np.float16)},
        {"model.x.scales": np.ones((2, 1), np.uint8)},
        {"model.x.weight": np.zeros((2, 7), np.uint32)},
        {"model.x.weight": np.zeros((2, 8), np.int32)},
        {"model.x.weight": np.zeros((), np.uint32)},
    ],
    ids=lambda change: f"{next(iter(change))} {next(iter(change.values())).shape}",
)
def test_impossible_affine_forms_are_refused(tmp_path: Path, change: Arrays) -> None:
    folder = write(tmp_path / "c", {"x.safetensors": affine() | change})
    with pytest.raises(CheckpointError, match="no MLX affine form"):
        Checkpoint.open(folder).matrix("x", 2, 64)


def test_missing_biases_are_named(tmp_path: Path) -> None:
    tensors = affine()
    del tensors["model.x.biases"]
    with pytest.raises(CheckpointError, match=r"no tensor 'x\.biases'"):
        Checkpoint.open(write(tmp_path / "c", {"x.safetensors": tensors})).matrix("x", 2, 64)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"x.safetensors": {"x.weight": np.zeros((2, 64), np.int8)}})
    with pytest.raises(CheckpointError, match="I8 without a scale"):
        Checkpoint.open(folder).matrix("x", 2, 64)


@pytest.mark.parametrize(("shape", "kind"), [((8, 1, 4), "hf"), ((8, 4, 1), "mlx")])
def test_the_convolution_tells_who_wrote_it(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    name = "model.layers.0.linear_attn.conv1d.weight"
    folder = write(tmp_path / "c", {"x.safetensors": {name: np.zeros(shape, np.float32)}})
    assert Checkpoint.open(folder).kind == kind


def test_without_a_convolution_the_metadata_tells(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {})
    save_file({"a": np.zeros(1, np.float32)}, folder / "x.safetensors", {"format": "mlx"})
    assert Checkpoint.open(folder).kind == "mlx"


def test_a_vector_of_another_size_or_with_nan_is_refused(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(3, np.float32), "b": np.array([1, np.nan], np.float32)}
    checkpoint = Checkpoint.open(write(tmp_path / "c", {"x.safetensors": tensors}))
    with pytest.raises(CheckpointError, match="4 values wanted"):
        checkpoint.vector("a", 4)
    with pytest.raises(CheckpointError, match="NaN"):
        checkpoint.vector("b", 2)


def test_the_fingerprint_follows_the_content_only(tmp_path: Path) -> None:
    tensors = {"a": np.zeros(2000, np.float32)}
    first = Checkpoint.open(write(tmp_path / "1", {"x.safetensors": tensors}))
    second = Checkpoint.open(write(tmp_path / "2", {"x.safetensors": tensors}))
    third = Checkpoint.open(write(tmp_path / "3", {"x.safetensors": {"a": np.ones(2000, np.float32)}}))
    prints = [checkpoint.fingerprint("x.safetensors") for checkpoint in (first, second, third)]
    assert prints[0] == prints[1] != prints[2]


def test_headers_survive_json(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "c", {"x.safetensors": affine()}))
    header = checkpoint.headers["x.safetensors"]
    assert header_from_json(json.loads(json.dumps(header_to_json(header)))) == header


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(JSON_VALUES)
@settings(max_examples=150, deadline=None)
def test_any_quantization_table_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    folder = write(tmp_path_factory.mktemp("c"), {"x.safetensors": affine()}, {"quantization": value})
    with suppress(CheckpointError):
        Checkpoint.open(folder).matrix("x", 2, 64)
