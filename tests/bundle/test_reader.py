"""Opening bundles, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from flashmoe.bundle import Bundle, TileCodec
from flashmoe.errors import BundleError, ReadError


def edit_manifest(bundle: Path, **changes: Any) -> None:
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_whole_bundle_opens(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    assert bundle.model_type == "qwen3_5_moe"
    assert bundle.text_config["hidden_size"] == 64
    assert bundle.generation_config["top_k"] == 20
    assert [(layer.layer, layer.count) for layer in bundle.expert_layers] == [(0, 4), (1, 4)]
    assert bundle.tensor("layers.0.linear_attn.conv1d").shape == (128, 4)
    assert "lm_head" in bundle
    assert "mtp.norm" not in bundle
    with pytest.raises(BundleError, match="no tensor"):
        bundle.tensor("mtp.norm")


def test_tensors_are_aligned_and_the_embedding_is_last(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    infos = [bundle.tensor(name) for name in bundle.tensor_names()]
    assert all(info.offset % 64 == 0 for info in infos)
    assert infos[0].offset % 4096 == 0
    assert infos[-1].name == "embed_tokens"
    assert infos[-1].offset % 4096 == 0
    assert bundle.resident_path.stat().st_size % 4096 == 0


def test_the_official_library_reads_the_resident_file(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    with safe_open(bundle.resident_path, "numpy") as file:
        for name in bundle.tensor_names():
            assert np.array_equal(file.get_tensor(name), bundle.read(name))


def test_read_gives_tiles_and_vectors(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    gate = bundle.tensor("layers.1.mlp.gate")
    assert gate.codec == TileCodec(8, 64)
    assert gate.codec.dequantize(bundle.read(gate.name), gate.rows, gate.cols).shape == (4, 64)
    assert bundle.read("norm").dtype == np.float32
    assert bundle.read_expert(1, 3).size == bundle.expert_layers[1].record_nbytes
    with pytest.raises(BundleError, match="no expert 4 in layer 1"):
        bundle.read_expert(1, 4)


def test_a_file_that_shrinks_after_opening_is_an_error(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    file = bundle.expert_layers[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ReadError, match=r"layer-000\.bin ends at byte"):
        bundle.read_expert(0, 3)


@pytest.mark.parametrize("file", ["experts/layer-001.bin", "resident.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_files_of_a_wrong_size_are_refused(small_bundle: Path, file: str, damage: str) -> None:
    path = small_bundle / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if damage == "shorter" else content + b"12345")
    with pytest.raises(BundleError, match=path.name) as caught:
        Bundle.open(small_bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_other_format_versions_are_refused(small_bundle: Path, version: object) -> None:
    edit_manifest(small_bundle, format_version=version)
    with pytest.raises(BundleError, match=r"format_version is .* this flashmoe reads"):
        Bundle.open(small_bundle)


def test_a_folder_without_manifest_is_no_bundle(small_bundle: Path) -> None:
    (small_bundle / "manifest.json").unlink()
    with pytest.raises(BundleError, match="flashmoe convert"):
        Bundle.open(small_bundle)


def test_manifest_and_resident_file_must_agree(small_bundle: Path) -> None:
    tensors = json.loads((small_bundle / "manifest.json").read_text())["tensors"]
    tensors["norm"]["shape"] = [32]
    edit_manifest(small_bundle, tensors=tensors)
    with pytest.raises(BundleError, match="disagree about 'norm'"):
        Bundle.open(small_bundle)
