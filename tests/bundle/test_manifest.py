"""Reading manifests that something has tampered with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.bundle.codecs import DenseCodec, FfnLayout, TileCodec
from flashmoe.bundle.manifest import FileRecord, LayerRecord, Manifest, TensorRecord, parse_manifest
from flashmoe.errors import BundleError, FlashmoeError

FFN = FfnLayout(64, 32, TileCodec(4, 64), TileCodec(4, 32))
MANIFEST = Manifest(
    model_type="qwen3_5_moe",
    source={"name": "tiny"},
    quantization_note="none",
    lossless=True,
    tensors={
        "norm": TensorRecord(DenseCodec("f32"), (64,), "0" * 16),
        "lm_head": TensorRecord(TileCodec(4, 64), (100, 64), "1" * 16),
        "layers.0.mlp.shared_expert": TensorRecord(FFN, (32, 64), "2" * 16),
    },
    expert_count=2,
    experts=[LayerRecord(0, "experts/layer-000.bin", FFN.record_nbytes, FFN, ("a" * 16, "b" * 16))],
    skipped=[{"prefix": "mtp.", "tensors": 3, "nbytes": 12}],
    files={"config.json": FileRecord(10, "c" * 16)},
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def plain() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(MANIFEST.to_json()))
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    if isinstance(value, dict):
        return [p for key, item in value.items() for p in [(*path, key), *places(item, (*path, key))]]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in [(*path, i), *places(item, (*path, i))]]
    return []


PLACES = places(plain())


def test_a_manifest_survives_json() -> None:
    assert parse_manifest(plain()) == MANIFEST


@pytest.mark.parametrize("file", ["/etc/passwd", "../experts.bin", "experts/../../x"])
def test_files_outside_the_bundle_are_refused(file: str) -> None:
    value = plain()
    value["experts"]["layers"][0]["file"] = file
    with pytest.raises(BundleError, match="outside the bundle"):
        parse_manifest(value)


def test_every_expert_needs_a_checksum() -> None:
    value = plain()
    value["experts"]["count"] = 3
    with pytest.raises(BundleError, match="2 checksums for 3 experts"):
        parse_manifest(value)


@given(st.sampled_from(PLACES), JSON_VALUES)
@settings(max_examples=400, deadline=None)
def test_any_changed_value_is_accepted_or_a_bundle_error(place: tuple[Any, ...], replacement: object) -> None:
    value = plain()
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = replacement
    try:
        parse_manifest(value)
    except FlashmoeError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


@given(JSON_VALUES)
@settings(max_examples=100, deadline=None)
def test_any_json_is_refused_politely(value: object) -> None:
    with pytest.raises(BundleError):
        parse_manifest(value)
